"""What a user did or has that cannot work: each message names key, value, rule and way out.

The command line prints such an error as one line and leaves with code 2 (3 for storage that failed). Anything else that
is raised is a bug of ours (or the machine's) and keeps its traceback.
"""


class VitscaleError(ValueError):
    """Base of the errors that are the user's to mend."""

    reported: bool  # set where it is known whether another rank has printed it
    requeues = False  # whether the same command may succeed later, with nothing mended: exit code 3 instead of 2


class ConfigError(VitscaleError):
    """A config key, its value, or a combination of values."""


class DataError(VitscaleError):
    """Shards, an index, samples or labels."""


class StorageError(VitscaleError):
    """Storage that failed for longer than data.patience_s."""

    requeues = True


class CheckpointError(VitscaleError):
    """A checkpoint folder or a saved model."""


class CorruptionError(VitscaleError):
    """Ranks hold different bits of what they have in common: a node's memory or device is not sound."""

    requeues = True


class LaunchError(VitscaleError):
    """The environment that a launcher gave, or a run folder in use."""
