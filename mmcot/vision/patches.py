"""Vision features of a picture, an array [P, V], without an encoder.

The built-in kind is ``patch``: squares of the picture itself. Encoders (``encoder_kinds.py``) give arrays of the same
form. numpy is imported when features are made, so that settings can name them without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURE_SIZE = 64  # pixels, after resizing; the default
SQUARE_SIZE = 8  # pixels; the default
PATCH_SCALE = 16.0  # scales the few large entries to the size of T5's text states


def patch_shape(picture_size: int = PICTURE_SIZE, square_size: int = SQUARE_SIZE) -> tuple[int, int]:
    """[P, V] of ``patch_features``."""
    grid = picture_size // square_size
    return grid**2, 3 * square_size**2 + 2 * grid


def patch_features(
    image: Image.Image, *, picture_size: int = PICTURE_SIZE, square_size: int = SQUARE_SIZE
) -> np.ndarray:
    """Cut a picture into squares with their positions.

    The fusion has no position encoding, so each patch contains its row and column.

    Args:
        image: any size and mode; resized to ``picture_size`` x ``picture_size`` pixels, RGB.
        square_size: of a square in pixels; divides ``picture_size`` into G rows and columns.

    Returns:
        float16 [G^2, 3 square_size^2 + 2 G], by default [64, 208]: per patch, in reading order, its values of ink
        (white is 0, black is 1), then its row and its column as one-hot vectors of G, all times 16.
    """
    import numpy as np
    from PIL import Image

    image = image.convert("RGB").resize((picture_size, picture_size), Image.Resampling.BILINEAR)
    grid = picture_size // square_size
    ink = 1.0 - np.asarray(image, dtype=np.float32) / 255.0
    patches = ink.reshape(grid, square_size, grid, square_size, 3).transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    one_hot = np.eye(grid, dtype=np.float32)
    return (PATCH_SCALE * np.concatenate([patches, one_hot[rows], one_hot[columns]], axis=1)).astype(np.float16)
