"""Files behind a URL: exact ranges, whole files, and the small files of a data folder.

``s3://``, ``gs://``, ``http(s)://`` and ``hf://`` are read by fsspec. Credentials and
endpoints are those of its packages (``AWS_*``, ``GOOGLE_APPLICATION_CREDENTIALS``,
``HF_TOKEN``), never part of the settings. A failed request is retried.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from data_shards.atomic_files import committing
from data_shards.credentials import hide_credentials, holds_credentials
from data_shards.errors import ShardError

PROTOCOLS = ("s3", "gs", "http", "https", "hf")
MAX_TRIES = 5
FIRST_WAIT_S = 0.25
_PIECE_BYTES = 8 << 20
T = TypeVar("T")


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path."""
    return "://" in str(location)


def check_url(url: str) -> None:
    """Check that a URL has a known protocol and no secret in it: URLs are shown in manifests and messages.

    Raises:
        ShardError: the URL has another protocol, or contains a secret.
    """
    if holds_credentials(url):
        raise ShardError(
            f"{hide_credentials(url)} contains a user, password or key; take it out and give it in the environment, as "
            "fsspec's packages read it"
        )
    if url.partition("://")[0] not in PROTOCOLS or "::" in url:
        raise ShardError(f"{url!r} is not of a protocol that is read ({', '.join(f'{name}://' for name in PROTOCOLS)})")


def read_range(url: str, start: int, size: int) -> bytes:
    """Read exactly ``size`` bytes of a file from byte ``start``.

    Raises:
        ShardError: the file cannot be read, or the server failed or sent other bytes.
    """
    filesystem, path = _open(url)

    def read() -> bytes:
        if filesystem.async_impl:
            data = filesystem.cat_file(path, start=start, end=start + size)
        else:
            with filesystem.open(path, "rb", cache_type="none") as file:
                file.seek(start)
                data = file.read(size)
        if len(data) > size:
            raise ShardError(
                f"{url}: the server does not serve ranges (requested {size:,} bytes, got {len(data):,}); set "
                "data.remote=cache"
            )
        if len(data) < size:
            raise OSError(f"got {len(data):,} of {size:,} bytes at {start:,}")
        return data

    return _try(read, url) if size else b""


def read_file(url: str) -> bytes:
    """Read a small file whole.

    Raises:
        FileNotFoundError: there is none.
        ShardError: the file cannot be read, or the server failed.
    """
    filesystem, path = _open(url)
    return _try(lambda: filesystem.cat_file(path), url)


def fetch_file(url: str, target: str | Path) -> str:
    """Copy a remote file to ``target`` atomically; returns its sha256."""
    filesystem, path = _open(url)

    def fetch() -> str:
        digest = hashlib.sha256()
        with committing(target) as temporary, filesystem.open(path, "rb") as source, open(temporary, "wb") as copy:
            while piece := source.read(_PIECE_BYTES):
                digest.update(piece)
                copy.write(piece)
        return digest.hexdigest()

    return _try(fetch, url)


def put_file(path: str | Path, url: str) -> None:
    """Copy a local file to a URL; an existing file is replaced when the upload is complete."""
    filesystem, target = _open(url)
    _try(lambda: filesystem.put_file(str(path), target), url, "written")


def put_bytes(data: bytes, url: str) -> None:
    """Write a small file to a URL."""
    filesystem, target = _open(url)
    _try(lambda: filesystem.pipe_file(target, data), url, "written")


def list_names(url: str) -> list[str]:
    """Return the sorted names of the entries of a folder; none where the folder does not exist."""
    filesystem, path = _open(url)
    filesystem.invalidate_cache()
    try:
        return sorted(
            name.rstrip("/").rpartition("/")[2] for name in _try(lambda: filesystem.ls(path, detail=False), url)
        )
    except FileNotFoundError:
        return []


def remove_folder(url: str) -> None:
    """Remove a folder with its contents."""
    filesystem, path = _open(url)
    _try(lambda: filesystem.rm(path, recursive=True), url, "removed")


@contextlib.contextmanager
def local_copy(location: str | Path) -> Iterator[Path]:
    """Yield a local file with the content of ``location``, which exists until the block ends."""
    if not is_remote(location):
        yield Path(location)
        return
    with tempfile.TemporaryDirectory(prefix="mmcot-") as folder:
        path = Path(folder) / "copy.tar"
        fetch_file(str(location), path)
        yield path


def list_urls(pattern: str) -> list[str]:
    """Return the sorted URLs that match a pattern with ``*``; a URL without ``*`` is returned unchanged."""
    if "*" not in pattern:
        return [pattern]
    filesystem, path = _open(pattern)
    return sorted(filesystem.unstrip_protocol(name) for name in _try(lambda: filesystem.glob(path), pattern))


def _open(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    check_url(url)
    try:
        if url.partition("://")[0] in ("http", "https"):
            from data_shards.http_redirects import open_session

            return fsspec.core.url_to_fs(url, get_client=open_session)
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ShardError(f"{url}: {url.partition('://')[0]}:// needs another package: {error}") from error


def _try(attempt: Callable[[], T], url: str, done: str = "read") -> T:
    """Run ``attempt`` until it succeeds, at most ``MAX_TRIES`` times, with growing waits between them."""
    for number in range(1, MAX_TRIES + 1):
        try:
            return attempt()
        except ShardError:
            raise
        except FileNotFoundError as error:
            if isinstance(error.__cause__, ShardError):  # fsspec takes a refused redirect for a missing file
                raise error.__cause__ from None
            raise
        except PermissionError as error:
            raise ShardError(
                f"{url} may not be {done} ({hide_credentials(str(error))}); give the credentials by environment, as "
                "fsspec's packages read them"
            ) from error
        except Exception as error:  # every package behind fsspec raises its own types
            if number == MAX_TRIES:
                raise ShardError(
                    f"{url} could not be {done} in {MAX_TRIES} tries; the last error: {type(error).__name__}: "
                    f"{hide_credentials(str(error))}"
                ) from error
            time.sleep(FIRST_WAIT_S * 2**number)
    raise AssertionError("unreachable")
