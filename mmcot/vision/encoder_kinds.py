"""All encoders of pictures, by the name of their features: the picture's own patches, and transformers' encoders.

    encode, shape = open_encoder("clip")      # shape [P, D]
    features = encode(pictures)               # float16 [B, P, D]

Another encoder is one entry of ``ENCODERS`` and a function from pictures to an array:

    def open_mine(model, device):
        network = load(model or "mine/base")
        return lambda images: network(images), (49, 512)      # floats [B, 49, 512] of B pictures

    ENCODERS["mine"] = Encoder(open_mine, default_model="mine/base")

A function with a method ``prepare`` (``PreparesPictures``) has its pictures resized in the threads that open them.

This module imports neither torch nor transformers, so that settings, messages and commands can list the encoders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from mmcot.errors import InputError
from mmcot.vision.model_kinds import MODEL_KINDS, Shape
from mmcot.vision.patches import PICTURE_SIZE, SQUARE_SIZE, patch_features, patch_shape

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

EncodePictures = Callable[["Sequence[Image.Image]"], "np.ndarray"]


@runtime_checkable
class PreparesPictures(Protocol):
    """A function from pictures to features whose first step may be done to each picture alone, in any thread."""

    def __call__(self, images: Sequence[Image.Image], /) -> np.ndarray:
        """Floats [B, P, D] of B pictures, prepared or not."""
        ...

    def prepare(self, image: Image.Image, /) -> Image.Image:
        """The picture that gives the same features, such as one of the model's size."""
        ...


@dataclass(frozen=True, slots=True)
class HalfEncoder:
    """An opened encoder: a function from B RGB pictures to float16 [B, P, D]."""

    name: str
    encode: EncodePictures

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Float16 [B, P, D] of B pictures.

        Raises:
            ValueError: a value is NaN, infinite or beyond float16.
        """
        return _encode_in_half(self.name, self.encode, images)

    def prepare(self, image: Image.Image) -> Image.Image:
        """The picture as the encoder prepares it, or as it is; its features are the same."""
        return self.encode.prepare(image) if isinstance(self.encode, PreparesPictures) else image


@dataclass(frozen=True, slots=True)
class Encoder:
    """How features of one name are made from pictures.

    Attributes:
        open: maps a model (a Hugging Face id or folder, None for the default one) and a device ("cpu", "cuda") to a
            function from B RGB pictures of any sizes to floats [B, P, D], and [P, D]. It is called once a process.
        default_model: the model that is used if none is given; None for an encoder without models.
        shape: [P, D] where it is the same for every model; compared when finished features are opened.
        grid: (rows, columns) if the patches are squares of the whole picture in reading order. None for encoders that
            may crop the picture, add a class token, pool it, or give objects instead of places (DETR's queries).
        is_square_grid: they are such squares, as many rows as columns, and the model decides how many.
        published_shape: [P, D] of the published system's feature files of this name.
        in_driver: the driver makes the features itself, because they need little work and no model.
    """

    open: Callable[[str | None, str], tuple[EncodePictures, Shape]]
    default_model: str | None = None
    shape: Shape | None = None
    grid: tuple[int, int] | None = None
    is_square_grid: bool = False
    published_shape: Shape | None = None
    in_driver: bool = False

    def grid_of(self, num_patches: int) -> tuple[int, int] | None:
        """Rows and columns of a picture's patches; None where they are no grid."""
        side = math.isqrt(num_patches)
        return (side, side) if self.is_square_grid and side**2 == num_patches else self.grid


def _open_patches(sizes: str | None, device: str) -> tuple[EncodePictures, Shape]:
    """Open the squares; their ``sizes`` are those of picture and square in pixels, such as "64/8"."""
    import numpy as np

    picture, square = map(int, sizes.split("/")) if sizes else (PICTURE_SIZE, SQUARE_SIZE)

    def encode(images: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([patch_features(image, picture_size=picture, square_size=square) for image in images])

    return encode, patch_shape(picture, square)


def _open_model(kind: str, model: str | None, device: str) -> tuple[EncodePictures, Shape]:
    from mmcot.vision.encoders import VisionEncoder

    encoder = VisionEncoder(kind, model, device=device)
    return encoder, encoder.shape


ENCODERS: dict[str, Encoder] = {
    "patch": Encoder(_open_patches, is_square_grid=True, in_driver=True),
    **{
        name: Encoder(
            partial(_open_model, name),
            default_model=kind.default_model,
            is_square_grid=kind.is_square_grid,
            published_shape=kind.published_shape,
        )
        for name, kind in MODEL_KINDS.items()
    },
}


def open_encoder(name: str, model: str | None = None, *, device: str = "cpu") -> tuple[HalfEncoder, Shape]:
    """Open an encoder; returns its function from B RGB pictures to float16 [B, P, D], and [P, D].

    Raises:
        ValueError: there is no encoder of this name. The function raises it for features beyond float16.
    """
    if name not in ENCODERS:
        raise InputError(f"features {name!r} cannot be made from pictures; expected one of {', '.join(ENCODERS)}")
    encode, shape = ENCODERS[name].open(model, device)
    return HalfEncoder(name, encode), shape


def _encode_in_half(name: str, encode: EncodePictures, images: Sequence[Image.Image]) -> np.ndarray:
    import numpy as np

    features = np.asarray(encode(images))
    if features.dtype == np.float16:
        return features
    with np.errstate(over="ignore"):
        halved = features.astype(np.float16)
    if not np.isfinite(halved).all():
        raise InputError(
            f"{name} features of {len(images)} pictures have values that are NaN, infinite or beyond float16 (the "
            f"largest is {np.abs(features).max()}); expected finite values up to {np.finfo(np.float16).max:g}"
        )
    return halved
