"""Tensors of any layout ↔ the host's names, shapes and order: each step with its inverse beside it.

Nothing here evaluates a weight: checkpoints are larger than memory.
"""
