"""Images made smaller before they are packed."""

from __future__ import annotations

import io

from PIL import Image, ImageOps

from vitscale.files.header import FORMATS, read_header

_MOST_PIXELS = 1_000_000_000
_JPEG_QUALITY = 95
_KEPT = {"JPEG": ("jpg", "JPEG"), "WEBP": ("webp", "WEBP")}  # what has lost bits stays so; all else is PNG
_AS_IT_IS = ("RGB", "RGBA", "L", "LA", "CMYK", "I;16", "F", "I")  # modes whose pixels can be averaged


def resized(data: bytes, kind: str, short_side: int) -> tuple[str, bytes]:
    """(extension, bytes) of an image whose shorter side is at most `short_side` pixels, by Pillow's bicubic filter.

    One that is no larger stays as it is, to the byte, and so does one that cannot be decoded: training counts those.
    JPEG and WebP stay JPEG and WebP (quality 95), others become PNG; the EXIF orientation is applied.
    """
    try:
        header = read_header(data, _MOST_PIXELS)
        if min(header.height, header.width) <= short_side:
            return kind, data
        return _resized(data, kind, header.kind, short_side)
    except MemoryError:
        raise
    except Exception:  # BadSample; and Pillow's decoders raise nearly anything on damaged files
        return kind, data


def _resized(data: bytes, kind: str, form: str, short_side: int) -> tuple[str, bytes]:
    """form: JPEG, also where Pillow calls it MPO: a telephone's picture with a further one behind it."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    scale = short_side / min(image.size)
    size = tuple(max(short_side, round(edge * scale)) for edge in image.size)
    new_kind, form = _KEPT.get(form, ("png", "PNG"))
    profile = image.info.get("icc_profile")
    in_inks = image.mode == "CMYK" and form != "JPEG"  # which PNG does not know
    image.draft(None, size)  # type: ignore[arg-type]  # a JPEG is decoded at the smallest DCT scale that covers it
    whole = ImageOps.exif_transpose(image)
    size = size if (whole.width < whole.height) == (size[0] < size[1]) else size[::-1]
    if in_inks:
        whole, profile = whole.convert("RGB"), None
    elif whole.mode not in _AS_IT_IS:
        whole = whole.convert("RGBA" if whole.has_transparency_data else "L" if whole.mode == "1" else "RGB")
    stream = io.BytesIO()
    small = whole.resize(size, Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    small.save(stream, form, quality=_JPEG_QUALITY, icc_profile=profile)
    return kind if kind == "jpeg" and new_kind == "jpg" else new_kind, stream.getvalue()
