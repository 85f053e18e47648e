"""The place of a run's folder, and its earlier places: a folder may be moved, alone or with the data around it.

    logs/identity-place.json    {"device": 66306, "inode": 1234, "path": "/b/runs/demo", "earlier": ["/a/runs/demo"]}

Files of a run are stored by paths relative to its folder. Paths outside of it (the data folder, MLflow's database)
are absolute; after a move they are looked for at the same place relative to the folder first. Version 0.1.0 stored
all paths as absolute ones and left no mark; the artifacts in its tracking file tell where the folder was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json
from launcher.config.sqlite_uris import SQLITE, sqlite_path, sqlite_uri
from launcher.runs.journal import JournalReader
from launcher.runs.records import read_place, shape_of_tracking_line


def mark_file(folder: Path) -> Path:
    """The file of a run's mark."""
    return folder / "logs" / "identity-place.json"


def read_mark(folder: Path) -> dict[str, Any] | None:
    """Return the stored mark of a run's folder, or None."""
    path = mark_file(folder)
    return read_place(path) if path.exists() else None


def renew_mark(folder: Path) -> None:
    """Store where the folder is now, and keep its earlier places."""
    status, here = folder.stat(), str(folder.absolute())
    earlier = [str(place) for place in earlier_places(folder)]
    mark = {"device": status.st_dev, "inode": status.st_ino, "path": here, "earlier": earlier}
    if mark != read_mark(folder):
        commit_json(mark_file(folder), mark)


def earlier_places(folder: Path) -> list[Path]:
    """Where the folder was before, the latest first; empty for one that was never moved."""
    mark = read_mark(folder)
    if mark is not None:
        places = [mark["path"], *mark["earlier"]]
    else:
        lines = JournalReader(folder / "logs" / "tracking.jsonl", shape=shape_of_tracking_line).read()
        started = [line["path"] for line in lines if line["do"] == "artifact" and line["path"].endswith("/run.yaml")]
        places = [os.path.dirname(path) for path in reversed(started)]
    here = str(folder.absolute())
    return [Path(place) for place in dict.fromkeys(places) if place != here]


def stored_path(folder: Path, path: Path) -> str:
    """The path of a file as it is stored: relative to the run's folder if it is inside."""
    absolute, here = path.absolute(), folder.absolute()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def file_of_run(folder: Path, stored: str) -> Path:
    """The present path of a stored one; an absolute path below an earlier place is one of this folder."""
    path = Path(stored)
    if not path.is_absolute():
        return folder / path
    inside = [path.relative_to(place) for place in earlier_places(folder) if path.is_relative_to(place)]
    return folder / inside[0] if inside else path


def place_around(folder: Path, path: str, *, keep: bool = False) -> str:
    """The present path of what is outside of a run's folder, such as its data, if both were moved together.

    A URL and a relative path, which depends on the working directory, are returned as they are. So is a path that
    exists while nothing exists at the same place relative to the folder.

    Args:
        keep: return a path that exists in any case.
    """
    if not os.path.isabs(path) or (keep and os.path.exists(path)):
        return path
    here = folder.absolute()
    moved = [os.path.normpath(here / os.path.relpath(path, place)) for place in earlier_places(folder)]
    found = [place for place in moved if os.path.exists(place)]
    if not found and not os.path.exists(os.path.dirname(path)):  # never made again at a place that was left
        found = [place for place in moved if os.path.exists(os.path.dirname(place))]
    return found[0] if found else path


def uri_around(folder: Path, uri: str, *, keep: bool = False) -> str:
    """The present URI of MLflow: ``place_around`` of an SQLite database."""
    if not uri.startswith(SQLITE):
        return uri
    stored = str(sqlite_path(uri))
    present = place_around(folder, stored, keep=keep)
    return uri if present == stored else sqlite_uri(Path(present))
