"""The exceptions for a checkpoint, and for a host, that this package cannot work with."""


class CheckpointError(ValueError):
    """A config field or a tensor is missing, ambiguous or unsupported.

    The message names the field or tensor, what was expected, what was found, and what the user can do.
    """


class MissingTensorError(CheckpointError):
    """A tensor lacks the others of its layer, which is no error in a part of a checkpoint."""


class HostError(RuntimeError):
    """The installed mlx-lm lacks something that this package builds on."""
