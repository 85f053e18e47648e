"""Features of problems, computed from their pictures.

Features are a float16 array [p, D], with p = 0 without a usable picture. Pictures are counted
under the names of ``PICTURE_COUNTS``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from PIL import Image

from data_shards.open_ahead import OpenPictures, Prepare, open_ahead
from data_shards.sources.pictures import MAX_PIXELS, PictureError, open_picture
from data_shards.sources.question_set import Picture
from mmcot.errors import Faults, InputError
from mmcot.texts.sample import Sample

PICTURE_COUNTS: tuple[str, ...] = (
    "num_with_features",
    "num_no_image",
    "num_picture_absent",
    "num_pictures_unreadable",
    "num_pictures_missing",
    "num_pictures_over_limit",
)
Encode = Callable[[Sequence[Image.Image]], np.ndarray]


def open_pictures_of(
    pictures: Callable[[Sample], Sequence[Picture]], *, max_pictures: int = 1, count_unreadable: bool = False
) -> OpenPictures:
    """Return a function that opens a problem's usable pictures as RGB and counts them.

    Args:
        pictures: maps a problem to its pictures, in reading order.
        max_pictures: how many of them are opened. A document's pictures are told apart by their order, so all of them
            or none must exist and be readable.
        count_unreadable: count an existing picture that cannot be read and continue without
            it, instead of raising ``PictureError``.
    """

    def open_pictures(problem: Sample, counts: Counter[str]) -> list[Image.Image]:
        named = pictures(problem)
        present = [picture for picture in named if isinstance(picture, bytes) or os.path.isfile(picture)]
        if problem.kind == "document" and present and len(present) != len(problem.images):
            absent = [str(picture) for picture in named if picture not in present]
            raise PictureError(
                f"document {problem.qid}: {len(present)} of its {len(problem.images)} pictures exist"
                + (f", {absent[0]} does not" if absent else "")
                + "; its pictures are told apart by their order: add the missing ones, or remove the document"
            )
        counts["num_pictures_missing"] += len(named) - len(present) if present else 0
        counts["num_pictures_over_limit"] += max(0, len(present) - max_pictures)
        opened = []
        for picture in present[:max_pictures]:
            name = f"question {problem.qid}: picture {'in the data set' if isinstance(picture, bytes) else picture}"
            try:
                opened.append(open_picture(picture, name=name))
            except PictureError:
                if not count_unreadable or problem.kind == "document":
                    raise
                counts["num_pictures_unreadable"] += 1
        if opened:
            counts["num_with_features"] += 1
        elif not present:
            counts["num_picture_absent" if problem.images else "num_no_image"] += 1
        return opened

    return open_pictures


def features_of_pictures(
    problems: Iterable[Sample],
    counts: Counter[str],
    *,
    open_pictures: OpenPictures,
    encode: Encode,
    shape: tuple[int, int],
    batch_size: int = 32,
    prepare: Prepare = lambda image: image,
    num_threads: int = 1,
    on_problem: Callable[[], None] = lambda: None,
    faults: Faults | None = None,
) -> Iterator[np.ndarray]:
    """Yield the features of every problem in order, float16 [p, D]: the concatenated patches of its pictures.

    The pictures of the next batches are opened in threads while one is encoded.

    Args:
        encode: maps RGB pictures to their features, float16 [B, P, D].
        shape: [P, D] of one picture.
        batch_size: pictures encoded together, fewer if they are very large; the pictures of one problem are never
            split, so a batch may have a few more.
        prepare: what ``encode`` would do to each picture first; done where it is opened.
        num_threads: threads that open pictures.
        on_problem: called when a problem's turn comes, its pictures opened.
        faults: gathers pictures that cannot be used, to tell them together; None raises the first.
    """
    waiting: list[tuple[Sample, int]] = []
    images: list[Image.Image] = []

    def encoded() -> Iterator[np.ndarray]:
        arrays = encode(images) if images else np.zeros((0, *shape), dtype=np.float16)
        if arrays.shape != (len(images), *shape) or arrays.dtype != np.float16:
            first = waiting[0][0].qid
            raise InputError(
                f"features of {len(images)} pictures from question {first} on: {arrays.dtype}{arrays.shape}, "
                f"expected float16{(len(images), *shape)}"
            )
        at = 0
        for _, number in waiting:
            yield arrays[at : at + number].reshape(-1, shape[1])
            at += number
        waiting.clear()
        images.clear()

    ahead = open_ahead(
        problems,
        counts,
        open_pictures=open_pictures,
        prepare=prepare,
        num_threads=num_threads,
        num_ahead=2 * batch_size,
        faults=faults,
    )
    for problem, opened in ahead:
        on_problem()
        waiting.append((problem, len(opened)))
        images += opened
        if is_batch(images, batch_size):
            yield from encoded()
    yield from encoded()


def is_batch(images: Sequence[Image.Image], batch_size: int) -> bool:
    """Whether there are enough pictures for a batch, by their number or by their memory."""
    return len(images) >= batch_size or sum(image.width * image.height for image in images) >= MAX_PIXELS
