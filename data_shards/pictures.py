"""Opening a picture as a camera or a browser would have it: RGB, upright, the first frame.

Files are judged by their content, never by their suffix.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from data_shards.questions import Picture

MAX_PIXELS = 100_000_000  # 300 MB as RGB; larger ones are errors rather than a full memory


class PictureError(ValueError):
    """A picture that is there but cannot be used; the message names it."""


def open_picture(picture: Picture, *, name: str) -> Image.Image:
    """Read a picture wholly into memory as RGB.

    Palettes, CMYK, grey and transparency (on white) become RGB, an EXIF rotation is
    applied, of an animation the first frame is taken.

    Args:
        picture: a file or the encoded bytes.
        name: what to call it in an error.

    Raises:
        PictureError: it is empty, cut off, of no known format, or too large.
    """
    data = picture if isinstance(picture, bytes) else picture.read_bytes()
    if not data:
        raise PictureError(f"{name} is an empty file; replace or remove it")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(
                    f"{name} has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read: make it smaller"
                )
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large to be read safely ({error}); make it smaller") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name} is no picture of a known format; replace or remove it") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError(f"{name} is damaged or cut off ({error}); replace or remove it") from None
