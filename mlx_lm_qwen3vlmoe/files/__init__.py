"""Safetensors files and folders on disk: read by header or by rows, and written whole or not at all.

Nothing here knows how experts are stored, or what a tensor is for.
"""
