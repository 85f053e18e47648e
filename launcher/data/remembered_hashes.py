"""The sha256 of files of a data set, remembered between commands.

A file is read again only when its size, its times or its inode have changed; otherwise it costs one ``stat``. What is
remembered is in a cache folder: without it, or where it cannot be written, every file is read.

    {"/data/train.jsonl": [8120, 1764321000000000000, 1764321000000000000, 921344, "9a1f..."]}
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path

from data_shards.atomic_files import commit_json, fingerprint, read_json, sha256_of_file
from mmcot.errors import InputError

# A file that was changed so short ago may change again within the same tick of its file system's clock.
_SETTLED_NS = 2_000_000_000


def sha256_of_files(files: Iterable[Path], cache_dir: str | Path, *, name: Path) -> dict[Path, str]:
    """Return the sha256 of each file.

    Args:
        cache_dir: where hashes are remembered.
        name: the data set; each has a file of hashes of its own.
    """
    memory = Path(cache_dir).expanduser() / "hashes" / f"{fingerprint(str(name.absolute()))}.json"
    known = _read(memory)
    found, kept = {}, {}
    for file in files:
        key, status = str(file.absolute()), file.stat()
        facts = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        *known_facts, known_sha256 = known.get(key) or [None]
        same = known_facts == facts
        found[file] = known_sha256 if same else sha256_of_file(file)
        if same or time.time_ns() - max(facts[1:3]) > _SETTLED_NS:
            kept[key] = [*facts, found[file]]
    if any(known.get(key) != value for key, value in kept.items()):
        with contextlib.suppress(OSError):  # a cache; without it the files are read again
            commit_json(memory, {**known, **kept})
    return found


def _read(memory: Path) -> dict[str, list]:
    try:
        content = read_json(memory)
    except (OSError, InputError):
        return {}
    stored = content if isinstance(content, dict) else {}
    return {key: facts for key, facts in stored.items() if isinstance(facts, list) and len(facts) == 5}
