"""Every random choice as a hash of what it is for: counters instead of generator state.

A key is a 64-bit integer folded from (seed, epoch, sample id, repeat, purpose); draw i of a key is
the i-th output of the splitmix64 stream that starts there (Steele, Lea, Flood 2014). All functions
take NumPy int64 arrays or torch int64 tensors and give the same bits for both, on any device:
int64 wraps in both, and torch has no unsigned shifts, so shifts are masked.
"""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= (1 << 63) else value


GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift(x: Any, bits: int) -> Any:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Any) -> Any:
    """splitmix64's finalizer: a bijection of int64 in which every input bit moves every output bit."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def fold(state: Any, value: Any) -> Any:
    """A new key from a key and one more value (array, tensor or Python int); order matters."""
    if isinstance(value, int):
        value = _mix_int(value)
    else:
        value = mix(value + GOLDEN)
    return mix((state + GOLDEN) ^ value)


def _mix_int(value: int) -> int:
    """`mix(value + GOLDEN)` in Python's own numbers, wrapped by hand: torch.compile computes it while tracing."""
    x = _signed(value + GOLDEN)
    x = _signed((x ^ _shift(x, 30)) * _MIX1)
    x = _signed((x ^ _shift(x, 27)) * _MIX2)
    return x ^ _shift(x, 31)


@cache
def purpose_code(purpose: str) -> int:
    """A purpose's name as an int64."""
    return int.from_bytes(blake2b(purpose.encode(), digest_size=8).digest(), "little", signed=True)


def key(purpose: str, *values: int) -> int:
    """The key of a purpose and some integers, as a Python int."""
    state = np.array([purpose_code(purpose)], dtype=np.int64)
    for value in values:
        state = fold(state, int(value))
    return int(state[0])


def sample_key(seed: int, epochs: Any, sample_ids: Any, repeats: Any = 0) -> Any:
    """int64 key of each sample in its epoch: what crop, flip, mask and drop path are drawn from.

    `sample_ids`: int64 array or tensor; `epochs`, `repeats` (which of several views of the sample): likewise,
    one a sample, or an int for all of them.
    """
    zeros = sample_ids * 0
    in_epoch = fold(zeros + key("sample", seed), zeros + epochs)
    return fold(fold(sample_ids, in_epoch), zeros + repeats)


def bits(keys: Any, count: int) -> Any:
    """`count` int64 draws of each key: shape [*keys.shape, count]."""
    return mix(keys[..., None] + (_arange(keys, count) + 1) * GOLDEN)


def uniform(keys: Any, purpose: str | int, count: int) -> Any:
    """`count` float64 in [0, 1) of each key for a purpose: shape [*keys.shape, count].

    `purpose`: its name, or its `purpose_code`, as code under torch.compile has it, which cannot trace the hash.
    """
    code = purpose_code(purpose) if isinstance(purpose, str) else purpose
    top = _shift(bits(fold(keys, code), count), 11)
    as_float = top.astype(np.float64) if isinstance(top, np.ndarray) else top.double()
    return as_float * 2.0**-53


def permutation(count: int, state: int) -> np.ndarray:
    """A permutation of range(count) for a key: int64 [count]."""
    draws = bits(np.array([state], dtype=np.int64), count)[0]
    return np.argsort(draws, kind="stable")


def _arange(like: Any, count: int) -> Any:
    if isinstance(like, np.ndarray):
        return np.arange(count, dtype=np.int64)
    import torch  # only where a tensor came in

    return torch.arange(count, dtype=torch.int64, device=like.device)
