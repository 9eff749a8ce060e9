"""What the machine asks for: a device its order in memory, MLX an order of evaluation, ranks their shares.

Nothing here knows of checkpoints, or changes what is stored.
"""
