"""Opening problems' pictures in threads, ahead of the encoder.

    for problem, images in open_ahead(problems, counts, open_pictures=..., num_threads=8, num_ahead=64):
        ...                                                # in the problems' order

Decoding and resizing a picture leave Python's lock, so threads use several processors, and pictures are opened while
the encoder computes. Order, counts and errors are those of opening them one by one: counts are added, and an error is
raised, when its problem's turn comes.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from data_shards.sources.pictures import MAX_PIXELS
from mmcot.errors import Faults, InputError
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
    faults: Faults | None = None,
) -> Iterator[tuple[Sample, list[Image.Image]]]:
    """Yield every problem with its pictures, in order.

    Args:
        prepare: applied to every picture in its thread, such as the resizing to an encoder's input.
        num_threads: pictures that are being opened at once, 400 MB for each of the largest that are read.
        num_ahead: problems that wait for their turn at most. While the opened pictures that wait have 100 million
            pixels, no thread opens another one.
        faults: gathers an ``InputError`` of ``open_pictures``; its problem then has no pictures. None raises it.

    Raises:
        Exception: whatever ``open_pictures`` raises for a problem; the pictures of the later ones are dropped.
    """
    space = _Space()

    def open_one(number: int, problem: Sample) -> tuple[list[Image.Image], Counter[str]]:
        own: Counter[str] = Counter()
        if not space.wait(number):
            return [], own  # nobody takes it any more
        images = [prepare(image) for image in open_pictures(problem, own)]
        space.fill(_num_pixels(images))
        return images, own

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="open-pictures")
    waiting: deque[tuple[Sample, _Opening]] = deque()
    remaining = enumerate(problems)
    try:
        while True:
            while len(waiting) < num_ahead and not space.is_full:
                if (numbered := next(remaining, None)) is None:
                    break
                waiting.append((numbered[1], pool.submit(open_one, *numbered)))
            if not waiting:
                return
            problem, opening = waiting.popleft()
            try:
                images, own = opening.result()
            except InputError as error:
                if faults is None:
                    raise
                faults.add(error)
                images, own = [], Counter()
            space.empty(_num_pixels(images))
            counts.update(own)
            yield problem, images
    finally:
        space.close()
        pool.shutdown(wait=True, cancel_futures=True)


class _Space:
    """The memory of pictures that are open and wait for their turn, by their pixels."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_pixels, self._turn, self._is_closed = 0, 0, False

    @property
    def is_full(self) -> bool:
        return self._num_pixels >= MAX_PIXELS

    def wait(self, number: int) -> bool:
        """Wait until the problem of this number may be opened; False where the reader has stopped."""
        with self._changed:
            # The one that the reader waits for is always opened.
            self._changed.wait_for(lambda: self._is_closed or self._turn == number or not self.is_full)
            return not self._is_closed

    def fill(self, num_pixels: int) -> None:
        with self._changed:
            self._num_pixels += num_pixels

    def empty(self, num_pixels: int) -> None:
        """The pictures of the problem whose turn it was are the reader's now."""
        with self._changed:
            self._num_pixels -= num_pixels
            self._turn += 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _num_pixels(images: Iterable[Image.Image]) -> int:
    return sum(image.width * image.height for image in images)
