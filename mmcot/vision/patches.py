"""Vision features of a picture, an array [P, V], without an encoder.

The built-in kind is ``patch``: squares of the picture itself. Encoders (``encoder_kinds.py``) give arrays of the same
form. numpy is imported when features are made, so that settings can name them without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PATCH_IMAGE_SIZE = 64  # pixels, after resizing
PATCH_SIZE = 8  # pixels
PATCH_SHAPE = ((PATCH_IMAGE_SIZE // PATCH_SIZE) ** 2, 3 * PATCH_SIZE**2 + 2 * (PATCH_IMAGE_SIZE // PATCH_SIZE))
PATCH_GRID = (PATCH_IMAGE_SIZE // PATCH_SIZE, PATCH_IMAGE_SIZE // PATCH_SIZE)  # rows, columns
PATCH_SCALE = 16.0  # scales the few large entries to the size of T5's text states


def patch_features(image: Image.Image) -> np.ndarray:
    """Cut a picture into 8x8-pixel squares with their positions.

    The fusion has no position encoding, so each patch contains its row and column.

    Args:
        image: any size and mode; resized to 64x64 RGB.

    Returns:
        float16 [64, 208]: per patch, in reading order, 192 values of ink (white is 0,
        black is 1), then its row and its column as one-hot vectors of 8, all times 16.
    """
    import numpy as np
    from PIL import Image

    image = image.convert("RGB").resize((PATCH_IMAGE_SIZE, PATCH_IMAGE_SIZE), Image.Resampling.BILINEAR)
    grid = PATCH_IMAGE_SIZE // PATCH_SIZE
    ink = 1.0 - np.asarray(image, dtype=np.float32) / 255.0
    patches = ink.reshape(grid, PATCH_SIZE, grid, PATCH_SIZE, 3).transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1)
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    one_hot = np.eye(grid, dtype=np.float32)
    return (PATCH_SCALE * np.concatenate([patches, one_hot[rows], one_hot[columns]], axis=1)).astype(np.float16)
