"""Which model types are this package's, and whether ``mlx_lm`` reaches it here.

Nothing here loads a checkpoint, or imports mlx or mlx_lm before a caller needs them.
"""
