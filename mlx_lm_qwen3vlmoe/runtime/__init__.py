"""What the machine asks for: an order in memory, an order of evaluation, shares of ranks, a release of mlx-lm.

Nothing here knows of checkpoints, or changes what is stored.
"""
