"""What a checkpoint is, whether it loads and what memory it takes.

Nothing here reads the data of a tensor: the config and the headers tell.
"""

from .report import inspect, render

__all__ = ["inspect", "render"]
