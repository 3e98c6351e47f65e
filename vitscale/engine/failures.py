"""Whose fault an exception is that ended a rank: the infrastructure's, the user's, or ours."""

from __future__ import annotations

import errno
import re

import torch
import torch.distributed as dist

from vitscale.config.schema import RunConfig
from vitscale.engine.room import is_out_of_gpu_memory, is_out_of_memory, lack
from vitscale.errors import ConfigError, InfrastructureError, StorageError, VitscaleError, failed_storage

# gloo has no exceptions of its own: what it says of a rank that is gone, or that does not answer.
_LOST = re.compile(
    r"(Connection (closed|reset) by peer|Connection refused|Broken pipe|Timed out waiting \d+ms"
    r"|timeout caused pair closure|connectFullMesh failed|Socket closed|wait timeout|Connection timed out"
    r"|No route to host|(Host|Network) is (down|unreachable))",
    re.IGNORECASE,
)
# CUDA says it in the same way as our own bugs: those of its errors that come from the device, its driver or its links.
_DEVICE = re.compile(
    r"\bECC\b|uncorrectable|hardware|NVLink|launch failure|unavailable|GPU (is|has been) lost|fallen off the bus"
    r"|driver shutting down|CUDA error: unknown error",
    re.IGNORECASE,
)
# What a file system gives that has become read-only after a fault, or for which a ticket has run out.
_WITHDRAWN = frozenset({errno.EROFS, errno.EACCES, errno.EKEYEXPIRED, errno.EKEYREVOKED})


def classified(error: Exception, config: RunConfig) -> Exception:
    """The error as a VitscaleError where it is not ours, with exit code 2 or 3; itself, with 1, where it is our bug."""
    if isinstance(error, VitscaleError):
        return error
    line = " ".join(str(error).partition("\n")[0].split())
    if is_out_of_gpu_memory(error):
        return ConfigError(
            f"train.micro_batch={config.train.micro_batch}: does not fit into the GPU's memory ({lack(error)}); lower "
            "it, which leaves the numbers as they are, or set train.gradient_checkpointing=true"
        )
    if is_out_of_memory(error):
        return InfrastructureError(
            f"the machine has no memory left ({lack(error)}); if that comes again, lower data.prefetch or "
            "train.micro_batch, or ask the scheduler for more"
        )
    if isinstance(error, OSError):
        if error.errno in _WITHDRAWN:
            what = f"{error.filename or 'storage'}: {error.strerror}"
            return StorageError(f"{what}, though it could be written before; start the run again once it can")
        return failed_storage(error) or error
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(line)):
        return InfrastructureError(f"another rank is gone, or has not answered for parallel.timeout_s ({line})")
    if isinstance(error, torch.AcceleratorError) and _DEVICE.search(line):
        return InfrastructureError(f"the GPU has failed ({line})")
    return error
