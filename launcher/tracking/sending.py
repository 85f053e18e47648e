"""Sending a run's tracking file to MLflow: while the run lasts, and afterwards by hand.

    with sending(settings, run_dir):        # a background thread of the pipeline
        ...
    sync_run(run_dir, settings)             # `mmcot sync RUN`: everything that MLflow does not have yet

An error of MLflow never stops a run: what was not sent is sent later.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from data_shards.atomic_files import read_json
from data_shards.credentials import hide_credentials
from launcher.config.loading import tracking_uri
from launcher.config.settings import Settings
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import PARENT, RunDir
from launcher.tracking.mlflow_sync import MlflowSync

_LOG = logging.getLogger("mmcot.tracking")
_MAX_FINAL_TRIES = 3
_FINAL_SEND_S = 90.0  # the end of a run waits at most this long for MLflow


@contextlib.contextmanager
def sending(settings: Settings, run_dir: RunDir, *, report: Callable[[str], None] = print) -> Iterator[None]:
    """Send in a background thread until the block ends, then the rest; report what could not be sent."""
    sync = MlflowSync(run_dir, uri=tracking_uri(settings), experiment=settings.tracking.experiment)
    stopped = threading.Event()
    thread = threading.Thread(
        target=_send_until, args=(sync, stopped, settings.tracking.send_every_s), name="mlflow", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_FINAL_SEND_S)
        waiting = sync.num_waiting() if not thread.is_alive() else None
        if waiting != 0:
            report(
                f"MLflow at {tracking_uri(settings)} did not accept everything ({waiting or 'some'} values wait); "
                f"`mmcot sync {run_dir.path}` sends them"
            )
        if refused := sync.refused:
            report(
                f"MLflow refused {len(refused)} values, the first of {refused[0]['run']}: {refused[0]['error']} "
                f"(all in {run_dir.mlflow_state})"
            )


def _send_until(sync: MlflowSync, stopped: threading.Event, every_s: float) -> None:
    """Send at intervals, less often while MLflow does not answer, and once more at the end."""
    pause, num_last = every_s, 0
    while num_last < _MAX_FINAL_TRIES:
        num_last += stopped.wait(pause if not num_last else 0.5)
        try:
            sync.send()
            pause = every_s
            if num_last:
                return
        except Exception as error:  # tracking never stops a run
            _LOG.warning("MLflow did not accept the data, trying again: %s", hide_credentials(str(error)))
            pause = min(60.0, 2 * pause)


def sync_run(run_dir: RunDir, settings: Settings) -> int:
    """Send everything that MLflow does not have; returns the number of lines and points.

    Raises:
        RuntimeError: MLflow did not accept it.
    """
    sync = MlflowSync(run_dir, uri=tracking_uri(settings), experiment=settings.tracking.experiment)
    waiting = sync.num_waiting()
    try:
        sync.send()
    except Exception as error:
        raise RuntimeError(
            f"MLflow at {tracking_uri(settings)} did not accept the data ({hide_credentials(str(error))}); nothing is "
            "lost: start the server (`mmcot mlflow up`) and run this again, or name another with --uri"
        ) from error
    return waiting


def is_everything_logged(run_dir: RunDir) -> bool:
    """Whether MLflow has every line of a run, and its parent run is FINISHED."""
    lines = list(JournalReader(run_dir.tracking).read())
    applied = read_json(run_dir.mlflow_state).get("applied", 0) if run_dir.mlflow_state.exists() else 0
    ended = [line.get("status") for line in lines if line["run"] == PARENT and line["do"] in ("start", "end")]
    return applied == len(lines) and (not ended or ended[-1] == "FINISHED")
