"""MLflow's SQLite store, created atomically, and the experiment in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_shards.atomic_files import clear_unfinished, committing


def create_store(uri: str) -> None:
    """Create an SQLite store atomically: one whose migrations were killed half-way never opens again."""
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    clear_unfinished(path.parent, f"{path.name}*")  # with its journal
    with committing(path) as temporary:
        SqlAlchemyStore(f"sqlite:///{temporary}", (path.parent / "mlartifacts").absolute().as_uri()).engine.dispose()


def find_experiment(client: Any, name: str, uri: str) -> str:
    """The id of the experiment of this name, created if it does not exist."""
    from mlflow.exceptions import MlflowException

    existing = client.get_experiment_by_name(name)
    if existing is not None:
        return existing.experiment_id
    artifacts = None
    if uri.startswith("sqlite:"):
        artifacts = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").absolute().as_uri()
    try:
        return client.create_experiment(name, artifact_location=artifacts)
    except MlflowException:  # another run created it first
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id
