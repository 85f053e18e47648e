"""Where a problem's features come from: pictures on the spot, or an array made elsewhere.

A feature is a float16 array [p, D], p = 0 without a usable picture. Both kinds count what they
met, under the names of ``PICTURE_COUNTS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from data_shards.sources.pictures import MAX_PIXELS, PictureError, open_picture
from data_shards.sources.question_set import Picture
from mmcot.texts.problem import Problem

PICTURE_COUNTS: tuple[str, ...] = (
    "num_with_features",
    "num_no_image",
    "num_picture_absent",
    "num_pictures_unreadable",
    "num_pictures_missing",
    "num_pictures_over_limit",
)
FeaturesOf = Callable[[Problem, Counter[str]], np.ndarray]
OpenPictures = Callable[[Problem, Counter[str]], list[Image.Image]]
Encode = Callable[[Sequence[Image.Image]], np.ndarray]


class FeatureError(ValueError):
    """Ready-made features that cannot be used; the message names file and row."""


def open_pictures_of(
    pictures: Callable[[Problem], Sequence[Picture]], *, max_pictures: int = 1, count_unreadable: bool = False
) -> OpenPictures:
    """A function from a problem to its usable pictures, as RGB, that counts what it meets.

    Args:
        pictures: problem to its pictures, in reading order.
        max_pictures: how many of them are opened.
        count_unreadable: count a picture that is there but cannot be read and go on
            without it, instead of raising ``PictureError``.
    """

    def open_pictures(problem: Problem, counts: Counter[str]) -> list[Image.Image]:
        named = pictures(problem)
        present = [picture for picture in named if isinstance(picture, bytes) or picture.is_file()]
        counts["num_pictures_missing"] += len(named) - len(present) if present else 0
        counts["num_pictures_over_limit"] += max(0, len(present) - max_pictures)
        opened = []
        for picture in present[:max_pictures]:
            name = f"question {problem.qid}: picture {'in the data set' if isinstance(picture, bytes) else picture}"
            try:
                opened.append(open_picture(picture, name=name))
            except PictureError:
                if not count_unreadable:
                    raise
                counts["num_pictures_unreadable"] += 1
        if opened:
            counts["num_with_features"] += 1
        elif not present:
            counts["num_picture_absent" if problem.images else "num_no_image"] += 1
        return opened

    return open_pictures


def features_of_pictures(
    problems: Iterable[Problem],
    counts: Counter[str],
    *,
    open_pictures: OpenPictures,
    encode: Encode,
    shape: tuple[int, int],
    batch_size: int = 32,
) -> Iterator[np.ndarray]:
    """Features of every problem in order, float16 [p, D]: the patches of its pictures behind each other.

    Args:
        encode: RGB pictures to their features, float16 [B, P, D].
        shape: [P, D] of one picture.
        batch_size: pictures encoded together, fewer of very large ones; the last of a batch may bring a few more.
    """
    waiting: list[tuple[Problem, int]] = []
    images: list[Image.Image] = []

    def encoded() -> Iterator[np.ndarray]:
        arrays = encode(images) if images else np.zeros((0, *shape), dtype=np.float16)
        if arrays.shape != (len(images), *shape) or arrays.dtype != np.float16:
            first = waiting[0][0].qid
            raise ValueError(
                f"features of {len(images)} pictures from question {first} on: {arrays.dtype}{arrays.shape}, "
                f"expected float16{(len(images), *shape)}"
            )
        at = 0
        for _, number in waiting:
            yield arrays[at : at + number].reshape(-1, shape[1])
            at += number
        waiting.clear()
        images.clear()

    for problem in problems:
        opened = open_pictures(problem, counts)
        waiting.append((problem, len(opened)))
        images += opened
        if is_batch(images, batch_size):
            yield from encoded()
    yield from encoded()


def is_batch(images: Sequence[Image.Image], batch_size: int) -> bool:
    """Whether pictures are enough to be encoded together: by their number, or by the memory that they take."""
    return len(images) >= batch_size or sum(image.width * image.height for image in images) >= MAX_PIXELS


def ready_made_features(
    array: np.ndarray, name_map: Mapping[str, str], *, name: str
) -> tuple[FeaturesOf, tuple[int, int]]:
    """Features of the published kind: one array for all questions, and a map from qid to row.

    A question of which the map has no row has no picture for the features, as in the
    published system; a pooled vector that was repeated P times is stored once.

    Args:
        array: floats [N, P, D]; may be memory-mapped.
        name_map: {qid: row as text}.
        name: the file, for errors.

    Returns:
        the function, and [P, D].

    Raises:
        FeatureError: the array is not [N, P, D], or a row lies outside it; when called:
            a row is not finite, or does not fit float16.
    """
    if array.ndim != 3 or array.dtype.kind != "f":
        raise FeatureError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected floats [rows, patches, width]"
        )
    rows = {qid: int(row) for qid, row in name_map.items()}
    outside = {qid: row for qid, row in rows.items() if not 0 <= row < len(array)}
    if outside:
        qid, row = next(iter(outside.items()))
        raise FeatureError(
            f"{name} has {len(array):,} rows, name_map.json asks for {len(outside):,} beyond them (question {qid}: "
            f"row {row}); "
            "take both files from the same download"
        )
    pooled = all(_is_pooled(array[row]) for row in list(rows.values())[:16]) and array.shape[1] > 1 and bool(rows)

    def features_of(problem: Problem, counts: Counter[str]) -> np.ndarray:
        if problem.qid not in rows:
            counts["num_picture_absent" if problem.images else "num_no_image"] += 1
            return np.zeros((0, array.shape[2]), dtype=np.float16)
        values = np.asarray(array[rows[problem.qid]])
        if pooled:
            if not _is_pooled(values):
                raise FeatureError(
                    f"{name}, row {rows[problem.qid]} (question {problem.qid}): patches differ, in other rows they "
                    "repeat"
                )
            values = values[:1]
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise FeatureError(
                f"{name}, row {rows[problem.qid]} (question {problem.qid}) holds NaN, infinity or values beyond "
                "float16; make it again"
            )
        counts["num_with_features"] += 1
        return half

    return features_of, (1 if pooled else array.shape[1], array.shape[2])


def _is_pooled(values: np.ndarray) -> bool:
    return bool((values == values[:1]).all())
