"""Tasks: what a student is examined in.

A task makes items over named skills, each with subskills, scores answers exactly, and writes the right answer to an
item as training data (the symbolic teacher). The tasks are ``arithmetic.Arithmetic``, ``programs.Programs`` and
``figures.Figures``; each is its own module, imported when it is used.
"""
