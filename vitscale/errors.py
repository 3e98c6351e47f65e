"""What a user did or has that cannot work: each message names key, value, rule and way out.

The command line prints such an error as one line and leaves with code 2, or 3 where the infrastructure is at fault.
Anything else that is raised is a bug of ours and keeps its traceback.
"""

import errno


class VitscaleError(ValueError):
    """Base of the errors that are not ours."""

    reported: bool  # set where it is known whether another rank has printed it
    requeues = False  # whether the same command may succeed later, with nothing mended: exit code 3 instead of 2


class ConfigError(VitscaleError):
    """A config key, its value, or a combination of values."""


class DataError(VitscaleError):
    """Shards, an index, samples or labels."""


class InfrastructureError(VitscaleError):
    """What a run depends on has failed under it: a rank, a node, the network, a device, storage."""

    requeues = True


class StorageError(InfrastructureError):
    """Storage that could not be written, or not be read for longer than data.patience_s."""


class CheckpointError(VitscaleError):
    """A checkpoint folder or a saved model."""


class CorruptionError(VitscaleError):
    """Ranks hold different bits of what they have in common: a node's memory or device is not sound."""

    requeues = True


class LaunchError(VitscaleError):
    """The environment that a launcher gave, or a run folder in use."""


# Of a network file system, or of the network itself; what a local file may never give, or only once.
TRANSIENT = frozenset({
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO, errno.ENOTCONN,
    errno.ESHUTDOWN, errno.ENODEV, errno.ENOLINK,
})  # fmt: skip

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def failed_storage(error: OSError) -> StorageError | None:
    """The error for what the storage (or the network to it) refused; None where `error` is of another kind."""
    if error.errno not in TRANSIENT | _FULL:
        return None
    way = "start the run again once it answers"
    if error.errno in _FULL:  # a write does not say to which file
        way = f"make room {'there' if error.filename else 'where the run has its folder and its temporary files'}"
    return StorageError(f"{error.filename or 'storage'}: {error.strerror}; {way}")
