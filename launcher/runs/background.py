"""Work that goes on in a thread beside a block of code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def background_thread(work: Callable[[threading.Event], None], *, name: str) -> Iterator[None]:
    """Run ``work`` in a thread while the block lasts; it returns soon after its event is set, which is waited for."""
    stopped = threading.Event()
    thread = threading.Thread(target=work, args=(stopped,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
