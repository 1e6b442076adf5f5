"""Reproductions: for each recipe the experiment that shows whether it does what its paper says."""
