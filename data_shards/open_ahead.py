"""Opening problems' pictures in threads, ahead of the encoder.

    for problem, images in open_ahead(problems, counts, open_pictures=..., num_threads=8, num_ahead=64):
        ...                                                # in the problems' order

Decoding and resizing a picture leave Python's lock, so threads use several processors, and pictures are opened while
the encoder computes. Order, counts and errors are those of opening them one by one: counts are added, and an error is
raised, when its problem's turn comes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from data_shards.sources.pictures import MAX_PIXELS
from mmcot.texts.sample import Sample

OpenPictures = Callable[[Sample, Counter[str]], list[Image.Image]]
Prepare = Callable[[Image.Image], Image.Image]
_Opening = Future[tuple[list[Image.Image], Counter[str]]]


def open_ahead(
    problems: Iterable[Sample],
    counts: Counter[str],
    *,
    open_pictures: OpenPictures,
    prepare: Prepare = lambda image: image,
    num_threads: int,
    num_ahead: int,
) -> Iterator[tuple[Sample, list[Image.Image]]]:
    """Yield every problem with its pictures, in order.

    Args:
        prepare: applied to every picture in its thread, such as the resizing to an encoder's input.
        num_threads: pictures that are being opened at once, 400 MB for each of the largest that are read.
        num_ahead: problems that wait for their turn at most; fewer while their pictures have 100 million pixels.

    Raises:
        Exception: whatever ``open_pictures`` raises for a problem; the pictures of the later ones are dropped.
    """

    def open_one(problem: Sample) -> tuple[list[Image.Image], Counter[str]]:
        own: Counter[str] = Counter()
        return [prepare(image) for image in open_pictures(problem, own)], own

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="open-pictures")
    waiting: deque[tuple[Sample, _Opening]] = deque()
    remaining = iter(problems)
    try:
        while True:
            while len(waiting) < num_ahead and _num_pixels(waiting) < MAX_PIXELS:
                if (problem := next(remaining, None)) is None:
                    break
                waiting.append((problem, pool.submit(open_one, problem)))
            if not waiting:
                return
            problem, opening = waiting.popleft()
            images, own = opening.result()
            counts.update(own)
            yield problem, images
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _num_pixels(waiting: Iterable[tuple[Sample, _Opening]]) -> int:
    """Pixels of the pictures that are open and wait for their turn."""
    finished = (opening for _, opening in waiting if opening.done() and not opening.exception())
    return sum(image.width * image.height for opening in finished for image in opening.result()[0])
