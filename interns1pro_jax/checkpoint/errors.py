"""The error of everything that reads or writes checkpoints."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, cannot be written or does not fit; the message names path, reason and remedy."""
