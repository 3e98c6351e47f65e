"""Where pixels go, beside timm's and Pillow's operations."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.augment.pictures import as_pillow, as_tensor, pictures
from vitscale.augment import geometry

FILL = (124, 116, 104)
NAMES = {"shear_x": "shear_x", "shear_y": "shear_y", "translate_x": "translate_x_rel",
         "translate_y": "translate_y_rel", "rotate": "rotate"}  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs"), NAMES.items())
def test_as_timms_on_pillow(ours: str, theirs: str) -> None:
    from timm.data import auto_augment

    images = pictures()
    fill = torch.tensor(FILL, dtype=torch.float32)
    for value in (-29.3, 3.0, 30.0, 90.0) if ours == "rotate" else (-0.29, -0.05, 0.0, 0.21, 0.45):
        got = getattr(geometry, ours)(images, torch.full((len(images),), value), fill)
        expected = [
            as_tensor(getattr(auto_augment, theirs)(as_pillow(i), value, resample=Image.BICUBIC, fillcolor=FILL))
            for i in images
        ]
        difference = ((got + 1e-3).floor() - torch.stack(expected)).abs()  # Pillow cuts the fraction off
        # A number near a whole one may be cut to either, and a place near the border may be on either side of it.
        assert float((difference > 0).float().mean()) < 0.02, value
        assert float((difference > 1).float().mean()) < 0.002, value


def test_each_image_by_its_own_value() -> None:
    images, fill = pictures(3, channels=5), torch.zeros(5)
    values = torch.tensor([-0.2, 0.0, 0.3])
    for name in NAMES:
        together = getattr(geometry, name)(images, values, fill)
        for place in range(3):
            alone = getattr(geometry, name)(images[[place]], values[[place]], fill)
            torch.testing.assert_close(together[[place]], alone, rtol=0, atol=1e-3)


def test_shift_is_a_crop_of_the_mirrored_image() -> None:
    images = pictures(4)
    rows, columns = torch.tensor([-4, 0, 3, 4]), torch.tensor([2, 0, -4, 4])
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    got = geometry.shift(images, rows, columns, 4)
    for image, whole, row, column in zip(got, padded, rows.tolist(), columns.tolist(), strict=True):
        assert torch.equal(image, whole[:, 4 + row : 4 + row + 37, 4 + column : 4 + column + 45])


def test_quarter_turns() -> None:
    images = pictures(4, (33, 33))
    got = geometry.quarter_turns(images, torch.tensor([0, 1, 2, 3]))
    for turns in range(4):
        assert torch.equal(got[turns], torch.rot90(images[turns], turns, (1, 2)))
