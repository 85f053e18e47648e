"""A local MLflow server with safe settings: `mmcot mlflow up`.

    server = plan_server(runs=Path("runs"), port=5000, environment=dict(os.environ))
    serve(server, report=print)        # until Ctrl-C or SIGTERM; then no process is left

Without further settings it serves ``mlflow.db`` of that folder, which the runs in it write.
With ``auth`` the folder also holds these files, readable only by their owner:

    mlflow-auth.db      users, if the backend store is SQLite; else they are in the backend store
    mlflow-auth.ini     the configuration of MLflow's basic-auth app
    mlflow-auth.key     the key that signs its forms, made once

Secrets come from the environment, or from files named in it as NAME_FILE. They are passed to
the server in its environment: every user of a machine can read a command line.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import errno
import http.client
import importlib.util
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from data_shards.atomic_files import exclusive
from launcher.config.sqlite_uris import SQLITE, sqlite_path, sqlite_uri
from launcher.runs.mlflow_pages import mlflow_page
from launcher.runs.signals import noting_stop
from launcher.tracking.mlflow_store import follow_artifacts
from launcher.tracking.server_auth import (
    _url,
    auth_environment,
    read_secret_files,
    refuse_password,
)
from mmcot.errors import InputError, OperationError

START_TIMEOUT_S = 180.0
SAY_EVERY_S = 4.0  # while the server starts
KEPT_LINES = 40  # of its output, for an error at its start
STOP_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True)
class ServerPlan:
    """The process to start: no secret is in ``command``, all secrets are in ``environment``."""

    command: list[str]
    environment: dict[str, str] = dataclasses.field(repr=False)
    runs: Path
    host: str
    port: int
    had_runs: bool = True  # whether the folder existed before

    @property
    def url(self) -> str:
        """The server's URL on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def plan_server(
    *,
    runs: Path,
    environment: dict[str, str],
    port: int = 5000,
    host: str = "127.0.0.1",
    backend_store_uri: str | None = None,
    artifacts: str | None = None,
    auth: bool = False,
    workers: int = 1,
    allowed_hosts: str | None = None,
) -> ServerPlan:
    """Check the settings before a start, and write the files that ``auth`` needs.

    Args:
        allowed_hosts: names by which clients reach the server, comma-separated, itself or through a
            proxy. Default: this machine's names and addresses where it listens beyond loopback.

    Raises:
        ValueError: a setting is not valid, or would give access to the server without a password.
        RuntimeError: a package is missing.
    """
    if workers < 1:
        raise InputError(f"--workers ({workers}) must be at least 1; one worker is enough for a team")
    if not _is_loopback(host) and not auth:
        raise InputError(
            f"--host {host} can be reached from other machines, and without --auth all their users may read, change "
            "and delete every run; add --auth, or keep 127.0.0.1 and give access by "
            f"`ssh -L {port}:127.0.0.1:{port} HOST`"
        )
    _check_port_is_free(host, port)
    runs = runs.absolute()
    environment = read_secret_files(environment)
    if backend_store_uri is not None:
        refuse_password(backend_store_uri)
    store = backend_store_uri or environment.get("MLFLOW_BACKEND_STORE_URI") or sqlite_uri(runs / "mlflow.db")
    destination = artifacts or environment.get("MLFLOW_ARTIFACTS_DESTINATION") or str(runs / "mlartifacts")
    if "://" not in destination:
        destination = str(Path(destination).absolute())
    _check_packages(store, destination, auth)
    had_runs = runs.exists()
    runs.mkdir(parents=True, exist_ok=True)
    environment |= {"MLFLOW_BACKEND_STORE_URI": store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", str(workers)]
    command += ["--serve-artifacts", "--artifacts-destination", destination, "--uvicorn-opts", "--log-level warning"]
    names = allowed_hosts or environment.get("MLFLOW_SERVER_ALLOWED_HOSTS") or ",".join(_own_names(host))
    if names:
        hosts, origins = _hosts_and_origins(names, port)
        command += ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]
    if auth:
        command += ["--app-name", "basic-auth"]
        environment |= auth_environment(runs, store, environment)
    return ServerPlan(command, environment, runs, host, port, had_runs)


def serve(server: ServerPlan, report: Callable[[str], None]) -> None:
    """Run the server in the foreground until Ctrl-C, SIGTERM or SIGHUP, then end all its processes.

    MLflow creates or checks the schema in one process before it starts workers; the lock keeps
    a second server of the same folder from doing this at the same time. What the server prints while it starts
    is shown if it does not start, what it prints later at once.

    Raises:
        RuntimeError: the server did not start, or ended by itself.
    """
    starting = contextlib.ExitStack()
    with starting, contextlib.ExitStack() as serving:
        starting.enter_context(exclusive(server.runs / ".mlflow"))
        store = server.environment["MLFLOW_BACKEND_STORE_URI"]
        if store.startswith(SQLITE) and sqlite_path(store).is_file():
            follow_artifacts(store)
        stop_signals = serving.enter_context(noting_stop())
        report(f"MLflow: starting{'' if server.had_runs else f'; {server.runs} is new and holds no run yet'}")
        leader = serving.enter_context(_process_group(server))
        output = _Output(leader)
        if not _wait_until_healthy(server, leader, output, stop_signals, report):
            return
        starting.close()
        output.show()
        report(f"MLflow: {_front_page(server)}   (Ctrl-C ends it)")
        while not stop_signals and leader.poll() is None:
            time.sleep(0.2)
        if not stop_signals:
            raise OperationError(
                f"the MLflow server ended by itself with status {leader.poll()}; its last lines are above"
            )
        report("MLflow: ended")


@contextlib.contextmanager
def _process_group(server: ServerPlan) -> Iterator[subprocess.Popen]:
    """Start the server in a process group of its own; at the end nothing of the group is alive."""
    leader = subprocess.Popen(
        server.command,
        env=server.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    try:
        yield leader
    finally:
        for wanted in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader.pid, wanted)
            with contextlib.suppress(subprocess.TimeoutExpired):
                leader.wait(STOP_TIMEOUT_S)


class _Output:
    """What a process prints: its last lines are kept, and from ``show`` on every line is passed on."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._shown, self._lines = False, collections.deque[str](maxlen=KEPT_LINES)
        self._process, self._thread = process, threading.Thread(target=self._read, name="mlflow-output", daemon=True)
        self._thread.start()

    def show(self) -> None:
        """Pass on every line from now on."""
        self._shown = True

    def last_lines(self) -> str:
        """The last lines of a process that has ended."""
        self._thread.join(STOP_TIMEOUT_S)
        return "\n".join(self._lines)

    def _read(self) -> None:
        for line in self._process.stdout or ():
            self._lines.append(line.rstrip())
            if self._shown:
                with contextlib.suppress(OSError):  # the terminal is closed; the server goes on
                    print(line, end="", file=sys.stderr, flush=True)


def _wait_until_healthy(
    server: ServerPlan,
    leader: subprocess.Popen,
    output: _Output,
    stop_signals: list[int],
    report: Callable[[str], None],
) -> bool:
    """Whether /health answered; False if a stop was requested first."""
    began = said = time.monotonic()
    deadline = began + START_TIMEOUT_S
    while not stop_signals:
        if leader.poll() is not None:
            raise OperationError(
                f"the MLflow server did not start (status {leader.poll()}); its last lines:\n{output.last_lines()}"
            )
        if time.monotonic() - said > SAY_EVERY_S:
            said = time.monotonic()
            report(f"MLflow: starting, {said - began:.0f} s")
        with contextlib.suppress(OSError):
            if _open(f"{server.url}/health").status == 200:
                return True
        if time.monotonic() > deadline:
            raise OperationError(
                f"the MLflow server did not answer at {server.url}/health within {START_TIMEOUT_S:.0f} s"
            )
        time.sleep(0.2)
    return False


def _front_page(server: ServerPlan) -> str:
    """The runs of the newest experiment; the list of experiments where there is none or a password is needed."""
    query = urllib.parse.urlencode({"max_results": 1, "filter": "name != 'Default'", "order_by": "creation_time DESC"})
    found = []
    with contextlib.suppress(OSError):
        found = json.load(_open(f"{server.url}/api/2.0/mlflow/experiments/search?{query}")).get("experiments", [])
    return mlflow_page(server.url, experiment_id=found[0]["experiment_id"] if found else None)


def _open(url: str) -> http.client.HTTPResponse:
    """Request a URL without a proxy: a proxy cannot reach this machine's loopback."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5)


def _end_with_parent() -> None:
    """Linux: make the kernel end the server when this command is killed (PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_port_is_free(host: str, port: int) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"--port ({port}) must be between 1 and 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port {port} of {host} is taken, perhaps by another MLflow server; choose another with --port"
            ) from None
        raise InputError(
            f"cannot listen at {host}, port {port} ({error.strerror or error}); give an address of this machine"
        ) from None


def _check_packages(store: str, destination: str, auth: bool) -> None:
    """Raise a short error for a missing package, instead of the server's traceback."""
    from sqlalchemy.exc import NoSuchModuleError

    url = _url(store)
    try:
        url.get_dialect().import_dbapi()
    except NoSuchModuleError:
        raise InputError(
            f"the backend store's kind, {url.drivername}, is not known; expected postgresql or sqlite"
        ) from None
    except ImportError as error:
        name = {"psycopg": "'psycopg[binary]'"}.get(error.name or "", error.name)
        raise OperationError(
            f"a backend store of kind {url.drivername} needs a package that is not installed: pip install {name}"
        ) from None
    if auth and not _installed("flask_wtf"):
        raise OperationError("--auth needs a package that is not installed: pip install Flask-WTF")
    if destination.startswith("s3:") and not _installed("boto3"):
        raise OperationError(f"artifacts at {destination} need a package that is not installed: pip install boto3")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _own_names(host: str) -> list[str]:
    """Names of this machine for other machines; none for loopback, which MLflow allows by itself."""
    if _is_loopback(host):
        return []
    if host not in ("0.0.0.0", "::"):
        return [host]
    names = [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError):
        names += socket.gethostbyname_ex(socket.gethostname())[2]
    return list(dict.fromkeys(names))


def _hosts_and_origins(names: str, port: int) -> tuple[list[str], list[str]]:
    """The strings that MLflow compares with a request's Host and (from a browser) Origin.

    MLflow refuses a browser's POST whose Origin is not listed, even from MLflow's own pages.
    """
    hosts = []
    for name in [*filter(None, map(str.strip, names.split(","))), "localhost", "127.0.0.1"]:
        name = f"[{name}]" if name.count(":") > 1 and not name.startswith("[") else name
        has_port = name.rpartition("]")[2].count(":") == 1
        hosts += [name] if has_port or "*" in name else [name, f"{name}:{port}"]
    return hosts, [f"{scheme}://{name}" for name in hosts if name != "*" for scheme in ("http", "https")]
