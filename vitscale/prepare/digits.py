"""Real images without a download: scikit-learn's 1,797 digits as shards. `python -m vitscale.prepare.digits OUT`

E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository 1998
(its test set): 8x8 grey images, ten classes.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitscale import rng
from vitscale.errors import VitscaleError
from vitscale.files.classes import CLASSES
from vitscale.prepare.pack import is_whole, require_new
from vitscale.prepare.writer import ImageBytes, PackedSample, write_shards

TEST_IMAGES = 360
_SHARD_SAMPLES = 200


def write_digits(out: Path) -> bool:
    """Write OUT/train (1,437 images) and OUT/test (360), labelled; False when they are there already.

    OUT appears whole or not at all, so that an interrupted start can simply be started again.
    """
    if all(is_whole(out / split) for split in ("train", "test")):
        return False
    require_new(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    samples = _samples()
    for split, chosen in (("test", samples[:TEST_IMAGES]), ("train", samples[TEST_IMAGES:])):
        shards = [chosen[start : start + _SHARD_SAMPLES] for start in range(0, len(chosen), _SHARD_SAMPLES)]
        write_shards(shards, partial / split, split, workers=1)
    (partial / CLASSES).write_text(json.dumps([str(digit) for digit in range(10)]) + "\n")
    partial.rename(out)
    return True


def _samples() -> list[PackedSample]:
    """All digits as 8-bit PNGs, in an order hashed from their numbers."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = rng.permutation(len(images), rng.key("digits"))
    origins = {number: ImageBytes("png", _png(images[number])) for number in order}
    return [PackedSample(f"{number:04d}", origin, len(origin.data), str(digits.target[number]))
            for number, origin in origins.items()]  # fmt: skip


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m vitscale.prepare.digits OUT", file=sys.stderr)
        return 2
    try:
        written = write_digits(Path(arguments[0]))
    except VitscaleError as error:
        print(f"vitscale: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[0]}: {'1,437 digits in train/, 360 in test/' if written else 'the digits are there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
