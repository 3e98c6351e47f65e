"""What ranks hold in common, compared by the bits: silent corruption is found, and the rank that has it named."""

from __future__ import annotations

import hashlib
import socket
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from vitscale.engine.ranks import ProcessRanks
from vitscale.errors import CorruptionError
from vitscale.text import listed

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def compare(step: int, tensors: Iterable[tuple[str, torch.Tensor]], ranks: ProcessRanks) -> None:
    """Raise CorruptionError on all ranks where one holds other bits than the others in tensors that all of them have.

    A collective, of 16 bytes where all is well. tensors: (name, tensor), as many and in the same order on every rank.
    """
    names, sums = [], []
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().view(_WHOLE_NUMBERS[tensor.element_size()])
        names.append(name)
        sums.append(bits.sum(dtype=torch.int64))  # one flipped bit always changes it
    if not sums:
        return
    digests = torch.stack(sums).cpu().numpy()
    if ranks.have_same(hashlib.sha256(digests.tobytes()).digest()):
        return
    gathered = ranks.gather((socket.gethostname(), digests))
    hosts = [f"rank {rank} on {host}" for rank, (host, _) in enumerate(gathered)]
    raise CorruptionError(f"step {step}: {told(hosts, names, [own for _, own in gathered])}")


def told(ranks: Sequence[str], names: Sequence[str], digests: Sequence[np.ndarray]) -> str:
    """Which of the ranks differ and in what: those that are not of the majority, where there is one."""
    by_rank = np.stack(digests)
    counts = Counter(own.tobytes() for own in by_rank)
    common, count = counts.most_common(1)[0]
    has_majority = 2 * count > len(ranks)
    wrong = [rank for rank, own in zip(ranks, by_rank, strict=True) if own.tobytes() != common or not has_majority]
    differing = [name for name, of_name in zip(names, by_rank.T, strict=True) if len(set(of_name.tolist())) > 1]
    others = "the other ranks" if has_majority else "each other"
    return (
        f"{listed(wrong)}: not the same bits as {others} in {len(differing)} of {len(names)} tensors that all ranks "
        f"have ({listed(differing, 3)}), so memory or a device there has changed them; the same command goes on from "
        "the newest checkpoint, before which they were compared (guard.digest_every_steps); if that node is named "
        "again, leave it out"
    )
