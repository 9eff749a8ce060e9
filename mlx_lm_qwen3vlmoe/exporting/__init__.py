"""Any checkpoint that loads → the plain text model, ``qwen3_moe``, for every tool that knows Qwen3-MoE.

Floats become the layout of the official Qwen3-30B-A3B, what is packed stays as mlx-lm saves it. Nothing here has a step
of its own: tensors are read by the steps of `layouts` and `sanitize`, and written by their inverses.
"""
