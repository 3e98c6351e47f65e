"""The hashed draws: the same in NumPy and torch, and as random as the run needs them.

Statistics use fixed seeds, so that a test passes always or never; bounds are far in the tail.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vitscale import rng

INT64 = st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(0, 2**31)


def sample_keys(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return rng.sample_key(seed, epoch, np.arange(count, dtype=np.int64))


@settings(max_examples=50)
@given(st.lists(INT64, min_size=1, max_size=8), SMALL, SMALL, st.integers(1, 9))
def test_torch_gives_numpys_bits(ids: list[int], seed: int, epoch: int, count: int) -> None:
    array, tensor = np.array(ids, dtype=np.int64), torch.tensor(ids, dtype=torch.int64)
    np.testing.assert_array_equal(rng.mix(array), rng.mix(tensor).numpy())
    keys, torch_keys = rng.sample_key(seed, epoch, array), rng.sample_key(seed, epoch, tensor)
    np.testing.assert_array_equal(keys, torch_keys.numpy())
    np.testing.assert_array_equal(rng.fold(keys, 3), rng.fold(torch_keys, 3).numpy())
    np.testing.assert_array_equal(rng.fold(keys, array), rng.fold(torch_keys, tensor).numpy())
    np.testing.assert_array_equal(rng.bits(keys, count), rng.bits(torch_keys, count).numpy())
    drawn, torch_drawn = rng.uniform(keys, "crop", count), rng.uniform(torch_keys, "crop", count)
    assert torch_drawn.dtype == torch.float64
    np.testing.assert_array_equal(drawn, torch_drawn.numpy())


def one_key(seed: int, epoch: int, sample_id: int, repeat: int) -> int:
    """A sample's key as the first runs had it, which took one epoch and one repeat a batch."""
    ids = np.array([sample_id], dtype=np.int64)
    return int(rng.fold(rng.fold(ids, rng.key("sample", seed, epoch)), repeat)[0])


@settings(max_examples=50)
@given(SMALL, st.lists(st.tuples(SMALL, INT64, st.integers(0, 64)), min_size=1, max_size=8))
def test_keys_of_many_epochs_and_repeats_are_those_of_each(seed: int, refs: list[tuple[int, int, int]]) -> None:
    epochs, ids, repeats = np.array(refs, dtype=np.int64).T.copy()
    expected = [one_key(seed, *ref) for ref in refs]
    assert rng.sample_key(seed, epochs, ids, repeats).tolist() == expected
    assert rng.sample_key(seed, *map(torch.from_numpy, (epochs, ids, repeats))).tolist() == expected
    epoch, repeat = refs[0][0], refs[0][2]
    same = [one_key(seed, epoch, sample_id, repeat) for _, sample_id, _ in refs]
    assert rng.sample_key(seed, epoch, ids, repeat).tolist() == same
    assert rng.sample_key(seed, epoch, torch.from_numpy(ids), repeat).tolist() == same


@settings(max_examples=100)
@given(INT64, INT64)
def test_a_number_folds_as_an_array_of_it_does(state: int, value: int) -> None:
    keys = np.array([state], dtype=np.int64)
    np.testing.assert_array_equal(rng.fold(keys, value), rng.fold(keys, np.array([value], dtype=np.int64)))


def test_a_purpose_is_its_name_or_its_code() -> None:
    keys = sample_keys(5)
    np.testing.assert_array_equal(rng.uniform(keys, "mask", 3), rng.uniform(keys, rng.purpose_code("mask"), 3))
    assert (rng.uniform(keys, "mask", 3) != rng.uniform(keys, "drop_path", 3)).all()


def test_values_never_change() -> None:
    """A change here would change every run: splitmix64's published stream, and this project's keys."""
    assert [int(x) & (2**64 - 1) for x in rng.bits(np.array([1234567], dtype=np.int64), 3)[0]] == [
        6457827717110365317,  # Vigna's splitmix64.c with x = 1234567
        3203168211198807973,
        9817491932198370423,
    ]
    assert rng.key("order", 0, 0) == -893681507253967583
    assert rng.sample_key(1, 2, np.array([3], dtype=np.int64))[0] == -7211164184967102908
    assert rng.permutation(8, 5).tolist() == [7, 1, 6, 3, 4, 2, 5, 0]


@settings(max_examples=100)
@given(st.lists(INT64, min_size=2, max_size=50, unique=True))
def test_mix_is_injective(values: list[int]) -> None:
    assert len(np.unique(rng.mix(np.array(values, dtype=np.int64)))) == len(values)


@settings(max_examples=50)
@given(INT64, INT64)
def test_fold_of_an_int_is_fold_of_an_array(state: int, value: int) -> None:
    states = np.array([state], dtype=np.int64)
    assert rng.fold(states, value)[0] == rng.fold(states, np.array([value], dtype=np.int64))[0]


def test_uniform_is_uniform() -> None:
    drawn = rng.uniform(sample_keys(4096), "crop", 64)
    assert drawn.shape == (4096, 64)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, bins=256, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kstest(drawn.ravel()[:50_000], "uniform").pvalue > 1e-3


def test_each_place_of_the_stream_is_uniform() -> None:
    drawn = rng.uniform(sample_keys(20_000), "flip", 4)
    for place in range(4):
        counts = np.histogram(drawn[:, place], bins=64, range=(0, 1))[0]
        assert stats.chisquare(counts).pvalue > 1e-3


def test_every_bit_is_fair() -> None:
    words = rng.bits(sample_keys(4096), 16).ravel()
    ones = np.array([((words >> bit) & 1).sum() for bit in range(64)])
    deviations = np.abs(ones - len(words) / 2) / np.sqrt(len(words) / 4)
    assert deviations.max() < 4.5


def _independent(one: np.ndarray, other: np.ndarray) -> None:
    """Chi-square of the joint histogram, and no correlation."""
    counts = np.histogram2d(one, other, bins=16, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(one))


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(["crop", "flip", "mask", "drop_path"], 2)))
def test_purposes_are_independent(one: str, other: str) -> None:
    keys = sample_keys(20_000)
    _independent(rng.uniform(keys, one, 1)[:, 0], rng.uniform(keys, other, 1)[:, 0])


def test_neighbours_are_independent() -> None:
    ids = np.arange(20_000, dtype=np.int64)

    def first(seed: int, epoch: int, shift: int = 0, repeat: int = 0) -> np.ndarray:
        return rng.uniform(rng.sample_key(seed, epoch, ids + shift, repeat), "crop", 1)[:, 0]

    here = first(0, 0)
    for other in (first(1, 0), first(0, 1), first(0, 0, shift=1), first(0, 0, shift=1 << 32), first(0, 0, repeat=1)):
        _independent(here, other)
    draws = rng.uniform(rng.sample_key(0, 0, ids), "crop", 2)
    _independent(draws[:, 0], draws[:, 1])


def test_seed_and_epoch_do_not_add_up() -> None:
    """seed + epoch arithmetic is the classic bug: seed 1 in epoch 2 would be seed 2 in epoch 1."""
    ids = np.arange(64, dtype=np.int64)
    keys = [rng.sample_key(seed, epoch, ids) for seed in range(24) for epoch in range(24)]
    assert len(np.unique(np.concatenate(keys))) == 24 * 24 * 64
    orders = {rng.key("order", seed, epoch) for seed in range(64) for epoch in range(64)}
    assert len(orders) == 64 * 64


@settings(max_examples=50)
@given(st.lists(SMALL, min_size=2, max_size=2, unique=True))
def test_the_order_of_values_matters(values: list[int]) -> None:
    one, other = values
    assert rng.key("order", one, other) != rng.key("order", other, one)
    assert rng.key("order", one) != rng.key("order", one, 0)
    assert rng.key("order", one) != rng.key("init", one)


def test_keys_of_many_samples_do_not_collide() -> None:
    shard, place = np.meshgrid(np.arange(512, dtype=np.int64), np.arange(512, dtype=np.int64))
    keys = rng.sample_key(0, 0, (shard << 32 | place).ravel())
    assert len(np.unique(keys)) == 512 * 512


@pytest.mark.parametrize("function", ["mix", "fold", "sample_key"])
def test_one_bit_in_moves_half_of_the_bits_out(function: str) -> None:
    hashed = {
        "mix": rng.mix,
        "fold": lambda x: rng.fold(x, 7),
        "sample_key": lambda x: rng.sample_key(3, 5, x),
    }[function]
    values = rng.bits(np.array([42], dtype=np.int64), 512)[0]
    for bit in range(64):
        flipped = values ^ np.int64(-(2**63) if bit == 63 else 1 << bit)
        moved = hashed(values) ^ hashed(flipped)
        share = np.mean([((moved >> place) & 1).mean() for place in range(64)])
        assert 0.47 < share < 0.53, f"bit {bit}"


@settings(max_examples=50)
@given(st.integers(0, 300), INT64)
def test_a_permutation_holds_each_number_once(count: int, state: int) -> None:
    assert sorted(rng.permutation(count, state).tolist()) == list(range(count))


def test_permutations_are_fair() -> None:
    orders = [tuple(rng.permutation(4, rng.key("order", 0, epoch)).tolist()) for epoch in range(4800)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_shapes() -> None:
    keys = sample_keys(6).reshape(2, 3)
    assert rng.uniform(keys, "mask", 5).shape == (2, 3, 5)
    assert rng.bits(keys, 0).shape == (2, 3, 0)
    assert rng.uniform(sample_keys(0), "mask", 5).shape == (0, 5)
    longer = rng.uniform(keys, "mask", 9)
    np.testing.assert_array_equal(longer[..., :5], rng.uniform(keys, "mask", 5))


def test_a_key_fits_int64() -> None:
    for values in ((), (0,), (-1,), (2**63 - 1, -(2**63)), (1, 2, 3, 4)):
        assert -(2**63) <= rng.key("anything", *values) < 2**63
