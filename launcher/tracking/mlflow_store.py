"""MLflow's SQLite store, created atomically, with artifacts in ``mlartifacts`` beside it, and the experiment in it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from data_shards.atomic_files import clear_unfinished, committing
from launcher.config.sqlite_uris import SQLITE, sqlite_path, sqlite_uri
from launcher.tracking import troubles

_ARTIFACTS = "mlartifacts"
_ADDRESSES = (  # columns in which MLflow stores absolute addresses of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def create_store(uri: str) -> None:
    """Create an SQLite store atomically: one whose migrations were killed half-way never opens again."""
    path = sqlite_path(uri)
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    clear_unfinished(path.parent, f"{path.name}*")  # with its journal
    with committing(path) as temporary:
        SqlAlchemyStore(sqlite_uri(temporary), _artifacts_beside(path)).engine.dispose()


def remove_escaped_folder(uri: str) -> None:
    """Remove the empty folder that MLflow makes for an address with escapes, because it does not decode them."""
    escaped = Path(uri.removeprefix(SQLITE)).parent
    if escaped != sqlite_path(uri).parent:
        with contextlib.suppress(OSError):
            os.removedirs(escaped)


def follow_artifacts(uri: str) -> None:
    """After a store was moved or copied with its artifacts, change their addresses in it to the present ones."""
    path = sqlite_path(uri)
    here = _artifacts_beside(path)
    with contextlib.closing(sqlite3.connect(path, timeout=troubles.LOCK_WAIT_S)) as store, store:
        addresses = [(table, column) for table, column in _ADDRESSES if column in _columns(store, table)]
        if _ADDRESSES[0] not in addresses:  # of another program, or empty
            return
        found = [location for (location,) in store.execute("SELECT artifact_location FROM experiments") if location]
        roots = {root for location in found for root in (location, location.rpartition("/")[0])}
        for root in roots - {here}:
            if root.startswith("file:///") and root.endswith(f"/{_ARTIFACTS}") and _was_left(root, path):
                for table, column in addresses:
                    store.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(root) + 1, root, len(root) + 1, f"{root}/"),
                    )


def _columns(store: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in store.execute(f"PRAGMA table_info({table})")}


def _was_left(root: str, path: Path) -> bool:
    """Whether the store is no longer beside these artifacts; not so where the database alone was moved."""
    folder = Path(urllib.request.url2pathname(urllib.parse.urlsplit(root).path)).parent
    if not (folder / _ARTIFACTS).exists():
        return True
    return (folder / path.name).exists() and not (folder / path.name).samefile(path)


def _artifacts_beside(path: Path) -> str:
    return (path.parent / _ARTIFACTS).absolute().as_uri()


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment of this name, created if it does not exist.

    Raises:
        Trouble: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is not None:
        if existing.lifecycle_stage == "deleted":
            raise troubles.deleted_experiment(name, existing.experiment_id, uri)
        return existing.experiment_id
    artifacts = None
    if uri.startswith("sqlite:"):
        artifacts = _artifacts_beside(sqlite_path(uri))
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:  # another run created it first
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id
