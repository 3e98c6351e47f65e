"""Random erasing, mixup and cutmix: beside timm's, and by the keys of samples and pairs alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vitscale import rng
from vitscale.augment.mix import Erase, Mix, _beta
from vitscale.augment.operations import ModelInputs

KEYS = rng.sample_key(5, 0, np.arange(6000, dtype=np.int64))


def run(operation: Any, images: torch.Tensor, keys: np.ndarray, labels: torch.Tensor | None = None) -> ModelInputs:
    drawn = operation.draw(SimpleNamespace(sample_keys=keys))
    on_device = {name: torch.from_numpy(array) for name, array in drawn.items()}
    return operation.apply(ModelInputs(images, torch.from_numpy(keys), labels), drawn, on_device)


def noise(n: int, size: tuple[int, int] = (20, 30)) -> torch.Tensor:
    return torch.randn(n, 3, *size, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("parameter", [0.1, 0.2, 0.8, 1.0, 3.0])
def test_shares_have_the_beta_distribution(parameter: float) -> None:
    stats = pytest.importorskip("scipy.stats", reason="no scipy here")
    draws = np.linspace(0.0005, 0.9995, 1000)
    assert np.abs(_beta(parameter, draws) - stats.beta(parameter, parameter).ppf(draws)).max() < 2e-4


def test_erased_boxes_are_timms_in_number_and_size() -> None:
    from timm.data.random_erasing import RandomErasing

    images = torch.zeros(2000, 1, 20, 30)
    ours = run(Erase(0.25, (20, 30)), images, KEYS[:2000]).pixel_values
    theirs = RandomErasing(0.25, mode="pixel", device="cpu")(images.clone())
    shares = []
    for erased in (ours, theirs):
        of_image = (erased != 0).flatten(1).float().mean(1)
        boxed = of_image[of_image > 0]
        shares.append((len(boxed) / 2000, float(boxed.mean()), float(boxed.std())))
        assert float(erased[erased != 0].mean().abs()) < 0.02
        assert 0.98 < float(erased[erased != 0].std()) < 1.02
    assert shares[0] == pytest.approx(shares[1], abs=0.04)


def test_erasing_leaves_the_rest_and_depends_on_the_key() -> None:
    images = noise(64)
    erase = Erase(0.5, (20, 30))
    got = run(erase, images, KEYS[:64]).pixel_values
    changed = (got != images).any(1)
    assert 16 < int(changed.flatten(1).any(1).sum()) < 48
    for mask in changed:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            assert bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()), "one box"
    alone = [run(erase, images[[i]], KEYS[[i]]).pixel_values[0] for i in range(64)]
    assert torch.equal(torch.stack(alone), got)


def test_each_pair_is_blended_or_cut_with_its_labels() -> None:
    n, size = 400, (16, 24)
    images, labels = noise(n, size), torch.arange(n) % 7
    mix = Mix(0.8, 1.0, 1.0, 0.5, size, 7)
    got = run(mix, images, KEYS[:n], labels)
    assert got.labels is not None
    assert got.labels.dtype == torch.float32
    torch.testing.assert_close(got.labels.sum(1), torch.ones(n))
    partners = images.view(-1, 2, 3, *size).flip(1).view_as(images)
    cut = 0
    for place in range(n):
        image, own, other = got.pixel_values[place], images[place], partners[place]
        first, second = int(labels[place]), int(labels[place ^ 1])
        share = float(got.labels[place, first]) if first != second else 1.0
        is_own, is_others = (torch.isclose(image, source, atol=1e-6).all(0) for source in (own, other))
        if bool((is_own | is_others).all()):
            cut += 1
            assert float(is_own.float().mean()) == pytest.approx(share, abs=1e-5), "the box's area is its share"
            rows = (~is_own).any(1).nonzero().flatten()
            assert not len(rows) or bool((~is_own)[rows[0] : rows[-1] + 1].any(1).all()), "one box"
        else:
            torch.testing.assert_close(image, share * own + (1 - share) * other, rtol=0, atol=1e-5)
        mirrored = got.pixel_values[place ^ 1]
        torch.testing.assert_close(image + mirrored, own + other, rtol=0, atol=1e-5)
    assert 160 < cut < 240


@pytest.mark.parametrize("size", [(16, 24), (15, 31)])
def test_the_same_shares_and_centres_give_timms_images_and_labels(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm's Mixup(mode="pair"), and the boxes of its rand_bbox, with Mix.draw's numbers in the place of its own."""
    from timm.data.mixup import Mixup

    n = 200
    images, labels = noise(n, size), torch.arange(n) % 7
    got = run(Mix(0.8, 1.0, 0.9, 0.5, size, 7), images, KEYS[:n], labels)
    draws = rng.uniform(rng.fold(KEYS[0:n:2], KEYS[1:n:2]), "mix", 5)
    cuts = draws[:, 1] < 0.5
    share = np.where(draws[:, 0] < 0.9, np.where(cuts, _beta(1.0, draws[:, 2]), _beta(0.8, draws[:, 2])), 1.0)
    centres = iter(np.floor(draws[:, 3:] * size)[cuts & (share < 1)].astype(np.int64).flatten())

    theirs = Mixup(0.8, 1.0, mode="pair", label_smoothing=0.0, num_classes=7)
    monkeypatch.setattr(theirs, "_params_per_elem", lambda pairs: (share.copy(), cuts))
    monkeypatch.setattr(np.random, "randint", lambda low, high, size: next(centres))
    order = np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)[::-1]])  # its partner of i is n - 1 - i
    mixed, target = theirs(images[order], labels[order])
    assert next(centres, None) is None
    torch.testing.assert_close(got.pixel_values[order], mixed, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.labels[order], target, rtol=0, atol=1e-6)  # type: ignore[index]


def test_as_often_as_asked_for_and_in_any_company() -> None:
    images, labels = noise(200, (8, 8)), torch.zeros(200, dtype=torch.int64)
    mix = Mix(0.8, 0.0, 0.3, 0.5, (8, 8), 2)
    got = run(mix, images, KEYS[:200], labels).pixel_values
    same = (got == images).flatten(1).all(1)
    assert 0.6 < float(same.float().mean()) < 0.8
    pairs = [run(mix, images[i : i + 2], KEYS[i : i + 2], labels[:2]).pixel_values for i in range(0, 200, 2)]
    assert torch.equal(torch.cat(pairs), got)


def test_labels_that_are_none_or_many() -> None:
    images = noise(4, (8, 8))
    mix = Mix(1.0, 0.0, 1.0, 0.5, (8, 8), 3)
    absent = run(mix, images, KEYS[:4], torch.tensor([2, -1, 0, 0])).labels
    assert absent is not None
    share = mix.draw(SimpleNamespace(sample_keys=KEYS[:4]))["share"]
    torch.testing.assert_close(absent[:2, 2], torch.tensor([share[0], 1 - share[0]]))
    assert float(absent[:2, :2].abs().sum()) == 0
    many = torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]])
    mixed = run(mix, images, KEYS[:4], many).labels
    assert mixed is not None
    torch.testing.assert_close(mixed[0], share[0] * many[0] + (1 - share[0]) * many[1])
