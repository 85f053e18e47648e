"""Work in a background thread while a block of code runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def background_thread(work: Callable[[threading.Event], None], *, name: str) -> Iterator[None]:
    """Run ``work`` in a thread while the block lasts; at the end its event is set and the thread is joined."""
    stopped = threading.Event()
    thread = threading.Thread(target=work, args=(stopped,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
