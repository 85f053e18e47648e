"""Errors of MLflow that a person must end, each as one sentence with its remedy."""

from __future__ import annotations

import contextlib
import errno
import re
import shlex
import shutil
import sqlite3
from pathlib import Path

from data_shards.credentials import hide_credentials
from launcher.config.sqlite_uris import SQLITE, sqlite_path

LOCK_WAIT_S = 5.0
_SCHEMES = "http://HOST:PORT, https://HOST, sqlite:////FOLDER/mlflow.db or postgresql://HOST/NAME"


class Trouble(RuntimeError):  # noqa: N818, as Stopped
    """MLflow does not take the data; the message says what to do.

    Attributes:
        lasts: whether trying again without a person's help is useless.
    """

    def __init__(self, message: str, *, lasts: bool = True) -> None:
        super().__init__(message)
        self.lasts = lasts


def deleted_experiment(name: str, experiment_id: str, uri: str) -> Trouble:
    """The run's experiment was deleted in MLflow."""
    return Trouble(
        f"the experiment {name!r} of MLflow at {hide_credentials(uri)} is deleted; restore it with "
        f"`MLFLOW_TRACKING_URI={shlex.quote(hide_credentials(uri))} mlflow experiments restore --experiment-id "
        f"{experiment_id}`, or name another: tracking.experiment for a new run, `mmcot sync RUN --experiment NAME` for "
        "one that has begun"
    )


def check_database(uri: str) -> None:
    """Check that an SQLite database can be written to; MLflow itself would try for minutes.

    Raises:
        sqlite3.Error: it cannot.
    """
    if uri.startswith(SQLITE) and (path := sqlite_path(uri)).exists():
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_WAIT_S)
        with contextlib.closing(database):
            database.execute("BEGIN IMMEDIATE")
            database.rollback()


def trouble_of(error: Exception, uri: str) -> Trouble | None:
    """The trouble behind an error of MLflow, or None where it is none of those known here."""
    if isinstance(error, Trouble):
        return error
    text, shown = str(error), hide_credentials(uri)
    file = sqlite_path(uri) if uri.startswith(SQLITE) else None
    if found := re.search(r"out-of-date database schema \(found version (\w+)", text):
        return Trouble(_schema(found[1], shown))
    if "unsupported URI" in text or "filesystem tracking backend" in text or _is_no_database(error):
        return Trouble(
            f"MLflow takes no address like {shown}; set tracking.uri or MLFLOW_TRACKING_URI to {_SCHEMES}, or remove "
            "it for mlflow.db in the folder of the runs"
        )
    if isinstance(error, ModuleNotFoundError):
        return Trouble(f"MLflow at {shown} needs the package {error.name}, which is not installed: pip install it")
    if file is None:
        return None
    if "database is locked" in text:
        return Trouble(
            f"another process holds MLflow's database {file} locked; `fuser {shlex.quote(str(file))}` names it: end it",
            lasts=False,
        )
    if "readonly database" in text:
        return Trouble(f"MLflow's database {file} cannot be written to; give this user the right to write to it")
    if "disk is full" in text or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(file.parent).free / 1e9
        return Trouble(f"the disk of MLflow's database {file} is full ({free:.2f} GB free); free some", lasts=False)
    return None


def _schema(found: str, uri: str) -> str:
    import mlflow

    migrations = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(migrations.glob(f"{found}_*.py")):
        return (
            f"MLflow's database {uri} is of an older version of MLflow; end its server, make a copy of the database, "
            f"then run `mlflow db upgrade {shlex.quote(uri)}`"
        )
    return (
        f"MLflow's database {uri} was written by another version of MLflow than {mlflow.__version__} (its schema "
        f"{found} is not known here); give another tracking.uri, or use that version's server by its http:// address"
    )


def _is_no_database(error: Exception) -> bool:
    from sqlalchemy.exc import ArgumentError

    return isinstance(error, ArgumentError)  # also of an unknown kind of database
