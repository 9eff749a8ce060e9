"""Tuned text back into the checkpoint that it came from.

Nothing here has a table of layouts of its own: the inverses in `layouts` and `sanitize` do the work.
"""
