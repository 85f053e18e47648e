"""Opening a picture as a browser shows it: RGB, upright, the first frame.

A file's format is detected from its content, not from its suffix, and only the decoders of
``FORMATS`` are used. Every error is raised as ``PictureError``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from data_shards.sources.question_set import Picture
from mmcot.errors import InputError
from mmcot.file_kinds import LFS_POINTER

# The formats that cameras, phones, browsers and scanners write. Pillow reads 40 more, of which EPS starts Ghostscript.
# MPO, which many phones name .jpg, is opened by the JPEG decoder: its first picture is a complete JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Pixels; the limit of WEBP. A longer side means a strip or a decompression bomb: encoders read a square of some
# hundred pixels.
MAX_SIDE = 16_384
MAX_PIXELS = 100_000_000  # 400 MB in Pillow's memory, twice that during a conversion
MAX_BYTES = 1_000_000_000  # of a file; 100 million uncompressed pixels of 8 bytes are less

_TURNS: dict[Any, Image.Transpose] = {  # by the value of EXIF's orientation, which may be of any type
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIGNATURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*")
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
_FULL_SCALES = {"I": (255, 65_535), "F": (1, 255, 65_535)}  # possible values of white; the first that no value exceeds
_OVERSHOOT = 1.02  # of white, by which a filter's or a resizing's values may exceed it
_STRIP_ROWS = 1024


class PictureError(InputError):
    """A picture exists but cannot be used; the message names it."""


def open_picture(picture: Picture, *, name: str, longest_side: int | None = None) -> Image.Image:
    """Read a whole picture into memory as RGB.

    Palettes, CMYK, grey of any depth and transparency (on white) are converted to RGB. An EXIF
    rotation is applied where it can be read. Of an animation the first frame is used.

    Args:
        picture: a file or the encoded bytes.
        name: the picture's name in an error message.
        longest_side: pixels that suffice; a JPEG may be decoded at a smaller size, but no smaller than this, which
            saves time and memory.

    Raises:
        PictureError: it is empty, truncated, too large, or has an unknown format.
    """
    data = _read(picture, name)
    try:
        with _open(data) as image:
            _check_size(image, name)
            if longest_side is not None:
                image.draft(None, (longest_side, longest_side))  # only JPEG supports it
            image.load()
            return _to_rgb(_upright(image))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large to be read safely ({error}); make it smaller") from None
    except UnidentifiedImageError:
        if data.startswith(LFS_POINTER):
            raise PictureError(
                f"{name} is a Git LFS pointer, no picture; run `git lfs pull` in its repository (install git-lfs first)"
            ) from None
        if data.startswith(_SIGNATURES):
            raise PictureError(
                f"{name} is damaged or cut off (its header cannot be read); replace or remove it"
            ) from None
        raise PictureError(
            f"{name} is no picture of a known format ({', '.join(FORMATS)}); convert, replace or remove it"
        ) from None
    except Exception as error:  # each decoder raises its own types: struct.error, IndexError, zlib.error, ...
        raise PictureError(
            f"{name} is damaged or cut off ({type(error).__name__}: {error}); replace or remove it"
        ) from None


def _read(picture: Picture, name: str) -> bytes:
    size = len(picture) if isinstance(picture, bytes) else picture.stat().st_size
    if size > MAX_BYTES:
        raise PictureError(f"{name} has {size:,} bytes; at most {MAX_BYTES:,} are read: make it smaller")
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    if not data:
        raise PictureError(f"{name} is an empty file; replace or remove it")
    return data


def _open(data: bytes) -> Image.Image:
    """Read a picture's header; a JPEG whose metadata Pillow cannot parse is read without them."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise
    except Exception:
        plain, exif = _without_metadata(data)
        if plain == data:
            raise
        image = Image.open(io.BytesIO(plain), formats=("JPEG",))
        if exif:
            image.info["exif"] = exif
        return image


def _without_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Return a JPEG without its application segments, except those on colour storage, and its EXIF block."""
    kept, exif, at = [data[:2]], b"", 2
    while data.startswith(b"\xff\xd8") and data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] != b"\xda":
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at:end]
        if 0xE0 <= segment[1] <= 0xEF and segment[1] not in (0xE0, 0xEE):  # JFIF and Adobe are kept
            if segment[4:10] == b"Exif\x00\x00":
                exif = exif or segment[4:]
        else:
            kept.append(segment)
        at = end
    return b"".join([*kept, data[at:]]), exif


def _check_size(image: Image.Image, name: str) -> None:
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
        raise PictureError(
            f"{name} has {image.width} x {image.height} pixels; sides up to {MAX_SIDE:,} and {MAX_PIXELS:,} pixels "
            "in all are read: make it smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Rotate a picture by its EXIF block; a block that cannot be read is ignored."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # struct.error, SyntaxError, ValueError, ...: the pixels are still valid
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in _FULL_SCALES:
        image = _to_grey(image)
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    """Convert grey of 16 bits, 32 bits or floats to 8 bits and keep its levels.

    Pillow's own conversion would clip them at 255. 32-bit integers and floats do not define which value is white. It is
    255 or 65,535, and for floats also 1: the smallest of these that no value exceeds. Otherwise, and where values are
    negative, black is the least value and white the greatest.
    """
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        grey = (values >> 8).astype(np.uint8)
    else:
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("it contains values that are NaN or infinite")
        white = next((scale for scale in _FULL_SCALES[image.mode] if low >= 0 and high <= scale * _OVERSHOOT), None)
        low, span = (0.0, float(white)) if white else (low, high - low or 1.0)
        grey = ((values.astype(np.float64) - low) * (255 / span) + 0.5).clip(0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image) -> Image.Image:
    """Paste a transparent picture on white, strip by strip, to limit memory."""
    flat = Image.new("RGB", image.size, "white")
    for top in range(0, image.height, _STRIP_ROWS):
        strip = image.crop((0, top, image.width, min(top + _STRIP_ROWS, image.height))).convert("RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip).convert("RGB"), (0, top))
    return flat
