"""The same updates elsewhere, for `scripts/speed.py`: common torch style, JAX, libraries.

Every module has one function that returns `run`: run(n) makes n complete updates at the shapes of
a data set, sampling included, and returns when they are done. They are written for comparison,
not for use; what a library's own update does differently stands in the module.
"""
