"""Passwords of the MLflow server, from the environment or files, never from a command line."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from launcher.config.sqlite_uris import sqlite_uri
from mmcot.errors import InputError

_SECRETS = ("MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_FLASK_SERVER_SECRET_KEY", "PGPASSWORD")


def read_secret_files(environment: dict[str, str]) -> dict[str, str]:
    """The environment with every NAME_FILE of a secret read into NAME; an empty value counts as not set."""
    environment = {
        name: value for name, value in environment.items() if value or not name.startswith(("MLFLOW_", "AWS_", "PG"))
    }
    for name in _SECRETS:
        path = environment.pop(f"{name}_FILE", None)
        if path is None:
            continue
        if environment.get(name):
            raise InputError(f"{name} and {name}_FILE are both set; keep one")
        if not Path(path).is_file():
            raise InputError(f"{name}_FILE names {path}, which is no file")
        environment[name] = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    return environment


def refuse_password(uri: str) -> None:
    """Raise ValueError if a database address given on the command line contains a password."""
    if "://" in uri and (_url(uri).password or "password" in _url(uri).query):
        raise InputError(
            "--backend-store-uri holds a password, which every user of this machine could read; put the address into "
            "the environment variable MLFLOW_BACKEND_STORE_URI, or into a file that MLFLOW_BACKEND_STORE_URI_FILE names"
        )


def _url(uri: str):
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(uri)
    except ArgumentError:  # its message would show the address, which may contain a password
        raise InputError(
            "the backend store is no database address; expected one like postgresql://USER@HOST/NAME or sqlite:///FILE"
        ) from None


def auth_environment(runs: Path, store: str, environment: dict[str, str]) -> dict[str, str]:
    """Write the files of MLflow's basic-auth app; returns the variables that it reads."""
    if not environment.get("MLFLOW_AUTH_ADMIN_PASSWORD"):
        raise InputError(
            "--auth needs the first administrator's password: set MLFLOW_AUTH_ADMIN_PASSWORD (12 characters or more), "
            "or MLFLOW_AUTH_ADMIN_PASSWORD_FILE to a file that holds it; the name is MLFLOW_AUTH_ADMIN_USERNAME, "
            "or admin"
        )
    found = {"MLFLOW_AUTH_ADMIN_USERNAME": environment.get("MLFLOW_AUTH_ADMIN_USERNAME") or "admin"}
    if not environment.get("MLFLOW_FLASK_SERVER_SECRET_KEY"):
        key = runs / "mlflow-auth.key"
        with contextlib.suppress(FileExistsError):
            _write_private(key, secrets.token_hex(32), new=True)
        found["MLFLOW_FLASK_SERVER_SECRET_KEY"] = key.read_text(encoding="utf-8").strip()
    if environment.get("MLFLOW_AUTH_CONFIG_PATH"):
        return found
    users = store
    if store.startswith("sqlite"):
        users = sqlite_uri(runs / "mlflow-auth.db")
        with contextlib.suppress(FileExistsError):
            _write_private(runs / "mlflow-auth.db", "", new=True)
    settings = {
        # A team logs into one experiment; only the user who created it may delete it or grant permissions.
        "default_permission": "EDIT",
        "database_uri": users,
        "admin_username": found["MLFLOW_AUTH_ADMIN_USERNAME"],
        "auth_cache_ttl_seconds": "60",  # else every request computes a password hash, which is slow by design
    }
    lines = [f"{name} = {value.replace('%', '%%')}\n" for name, value in settings.items()]  # configparser's escape
    _write_private(runs / "mlflow-auth.ini", "".join(["[mlflow]\n", *lines]))
    return {**found, "MLFLOW_AUTH_CONFIG_PATH": str(runs / "mlflow-auth.ini")}


def _write_private(path: Path, text: str, new: bool = False) -> None:
    """Write a file that only its owner can read; with ``new``, only if it does not exist."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | (os.O_EXCL if new else os.O_TRUNC), 0o600)
    with open(descriptor, "w", encoding="utf-8") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
