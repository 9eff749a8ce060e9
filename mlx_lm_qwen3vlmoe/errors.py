"""The exception for a checkpoint that cannot be loaded."""


class CheckpointError(ValueError):
    """A config field or a tensor is missing, ambiguous or unsupported.

    The message names the field or tensor, what was expected, what was found, and what the user can do.
    """


class MissingTensorError(CheckpointError):
    """A tensor lacks the others of its layer, which is no error in a part of a checkpoint."""
