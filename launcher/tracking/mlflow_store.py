"""MLflow's SQLite store, created atomically, and the experiment in it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from data_shards.atomic_files import clear_unfinished, committing
from launcher.config.sqlite_uris import SQLITE, sqlite_path, sqlite_uri
from launcher.tracking.troubles import deleted_experiment


def create_store(uri: str) -> None:
    """Create an SQLite store atomically: one whose migrations were killed half-way never opens again."""
    path = sqlite_path(uri)
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    clear_unfinished(path.parent, f"{path.name}*")  # with its journal
    with committing(path) as temporary:
        SqlAlchemyStore(sqlite_uri(temporary), (path.parent / "mlartifacts").absolute().as_uri()).engine.dispose()


def remove_escaped_folder(uri: str) -> None:
    """Remove the empty folder that MLflow makes for an address with escapes, because it does not decode them."""
    escaped = Path(uri.removeprefix(SQLITE)).parent
    if escaped != sqlite_path(uri).parent:
        with contextlib.suppress(OSError):
            os.removedirs(escaped)


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment of this name, created if it does not exist.

    Raises:
        Trouble: it is deleted.
    """
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is not None:
        if existing.lifecycle_stage == "deleted":
            raise deleted_experiment(name, existing.experiment_id, uri)
        return existing.experiment_id
    artifacts = None
    if uri.startswith("sqlite:"):
        artifacts = (sqlite_path(uri).parent / "mlartifacts").absolute().as_uri()
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:  # another run created it first
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id
