"""What is hidden: exact in number, a function of the sample alone, the same in NumPy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscale import rng
from vitscale.errors import ConfigError, DataError
from vitscale.models.masking import cell_masking, mask_noise, masked_cells, random_masking

few = settings(max_examples=25)


@few
@given(st.integers(2, 70), st.floats(0.05, 0.95), st.integers(0, 2**62))
def test_random_masking_hides_the_same_number_everywhere(patches: int, ratio: float, seed: int) -> None:
    noise = mask_noise(rng.sample_key(seed, 0, torch.arange(5)), patches)
    ids_keep, mask, ids_restore = random_masking(noise, ratio)
    kept = int(patches * (1 - ratio))
    assert ids_keep.shape == (5, kept)
    assert (mask.sum(1) == patches - kept).all()
    assert (mask.gather(1, ids_keep) == 0).all()  # what is kept is visible
    # ids_restore undoes the shuffle: the kept patches are its first places, in order.
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(kept).expand(5, -1))
    assert torch.equal(ids_restore.sort(1).values, torch.arange(patches).expand(5, -1))


def test_rows_equal_numpys() -> None:
    ids = np.arange(40)
    noise = rng.uniform(rng.sample_key(3, 1, ids), "mask", 49)
    order = np.argsort(noise, axis=1, kind="stable")
    ids_keep, _, ids_restore = random_masking(mask_noise(rng.sample_key(3, 1, torch.from_numpy(ids)), 49), 0.75)
    assert np.array_equal(ids_keep.numpy(), order[:, :12])
    assert np.array_equal(ids_restore.numpy(), np.argsort(order, axis=1))


def test_masks_do_not_depend_on_the_batch() -> None:
    keys = rng.sample_key(0, 0, torch.arange(12))
    shuffled = torch.tensor([7, 2, 11, 5])
    _, mask, _ = random_masking(mask_noise(keys, 16), 0.6)
    _, part, _ = random_masking(mask_noise(keys[shuffled], 16), 0.6)
    assert torch.equal(part, mask[shuffled])
    cells = cell_masking(keys, (8, 6), 2, 0.6)
    assert torch.equal(cell_masking(keys[shuffled], (8, 6), 2, 0.6), cells[shuffled])


@few
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.floats(0.05, 0.95))
def test_cells_are_whole_and_exact(rows: int, columns: int, side: int, ratio: float) -> None:
    count = int(np.ceil(rows * columns * ratio))
    keys = rng.sample_key(1, 2, torch.arange(4))
    if count == rows * columns:
        with pytest.raises(ConfigError, match="leave one"):
            cell_masking(keys, (rows * side, columns * side), side, ratio)
        return
    hidden = cell_masking(keys, (rows * side, columns * side), side, ratio)
    cells = hidden.view(4, rows, side, columns, side).permute(0, 1, 3, 2, 4).flatten(3)
    assert torch.equal(cells.any(-1), cells.all(-1))
    assert (cells.all(-1).flatten(1).sum(1) == count).all()


def test_every_cell_is_hidden_as_often() -> None:
    hidden = cell_masking(rng.sample_key(0, 0, torch.arange(2000)), (4, 4), 1, 0.5).float().mean(0)
    assert (hidden - 0.5).abs().max() < 0.05


def test_simmims_count_is_rounded_up() -> None:
    assert masked_cells(49, 0.6) == 30  # 224 px in cells of 32: SimMIM's own number


def test_cells_that_do_not_fit_the_grid() -> None:
    with pytest.raises(DataError, match=r"mask_patch=3.*8x6"):
        cell_masking(torch.arange(2), (8, 6), 3, 0.5)
