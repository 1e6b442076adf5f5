"""Reproductions: for each recipe the experiment that shows whether it does what its paper says.

Each file imports the recipe of its own name, and no other: the experiment runs the method as it ships, not a copy. It
stands apart so that the recipe can be read against its paper alone, and is deleted with it (a test holds both).
"""
