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

from data_shards.credentials import hide_credentials
from launcher.config.loading import tracking_uri
from launcher.config.settings import Settings
from launcher.runs.journal import JournalReader
from launcher.runs.records import read_mlflow_state, shape_of_tracking_line
from launcher.runs.run_dir import PARENT, RunDir
from launcher.tracking.mlflow_sync import MlflowSync
from launcher.tracking.troubles import Trouble
from mmcot.errors import InputError, OperationError

_LOG = logging.getLogger("mmcot.tracking")
_MAX_FINAL_TRIES = 3
_MAX_TROUBLES = 5  # a locked database may be free again
_FINAL_SEND_S = 90.0  # the end of a run waits at most this long for MLflow


@contextlib.contextmanager
def sending(settings: Settings, run_dir: RunDir, *, report: Callable[[str], None] = print) -> Iterator[None]:
    """Send in a background thread until the block ends, then the rest; report what could not be sent."""
    sync = MlflowSync(run_dir, uri=tracking_uri(settings), experiment=settings.tracking.experiment)
    stopped = threading.Event()
    troubles: list[Trouble] = []
    thread = threading.Thread(
        target=_send_until, args=(sync, stopped, settings.tracking.send_every_s, troubles), name="mlflow", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join(_FINAL_SEND_S)
        waiting = sync.num_waiting() if not thread.is_alive() else None
        if waiting != 0:
            why = f"{troubles[-1]}" if troubles else f"MLflow at {tracking_uri(settings)} did not accept everything"
            report(f"{why}; {waiting or 'some'} values wait: `mmcot sync {run_dir.path}` sends them")
        if refused := sync.refused:
            report(
                f"MLflow refused {len(refused)} values, the first of {refused[0]['run']}: {refused[0]['error']} "
                f"(all in {run_dir.mlflow_state})"
            )


def _send_until(sync: MlflowSync, stopped: threading.Event, every_s: float, troubles: list[Trouble]) -> None:
    """Send at intervals, less often while MLflow does not answer, and once more at the end.

    ``troubles`` takes what a person must end. While it lasts, or has occurred several times, only the end tries again.
    """
    pause: float | None = every_s
    num_last, said = 0, ""
    while num_last < _MAX_FINAL_TRIES:
        num_last += stopped.wait(pause if not num_last else 0.5)
        try:
            sync.send()
            pause = every_s
            troubles.clear()
            if num_last:
                return
        except Exception as error:  # tracking never stops a run
            text = hide_credentials(str(error))
            if text != said:
                _LOG.warning("MLflow did not accept the data: %s", text)
            said, pause = text, min(60.0, 2 * (pause or every_s))
            if isinstance(error, Trouble):
                troubles.append(error)
                if error.lasts and num_last:
                    return
                if error.lasts or len(troubles) >= _MAX_TROUBLES:
                    pause = None


def sync_run(run_dir: RunDir, settings: Settings, *, experiment: str | None = None) -> int:
    """Send everything that MLflow does not have; returns the number of lines and points.

    Args:
        experiment: send everything to this one, and also what the run logs later.

    Raises:
        RuntimeError: MLflow did not accept it.
    """
    sync = MlflowSync(run_dir, uri=tracking_uri(settings), experiment=settings.tracking.experiment)
    if experiment:
        sync.move_to(experiment)
    waiting = sync.num_waiting()
    try:
        sync.send()
    except Trouble as trouble:
        raise OperationError(f"{trouble}; nothing is lost: then run this again") from trouble
    except InputError:  # a file of the run
        raise
    except Exception as error:
        raise OperationError(
            f"MLflow at {tracking_uri(settings)} did not accept the data ({hide_credentials(str(error))}); nothing is "
            "lost: start the server (`mmcot mlflow up`) and run this again, or name another with --uri"
        ) from error
    return waiting


def is_everything_logged(run_dir: RunDir) -> bool:
    """Whether MLflow has every line of a run, and its parent run is FINISHED."""
    lines = list(JournalReader(run_dir.tracking, shape=shape_of_tracking_line).read())
    applied = read_mlflow_state(run_dir.mlflow_state).get("applied", 0)
    ended = [line.get("status") for line in lines if line["run"] == PARENT and line["do"] in ("start", "end")]
    return applied == len(lines) and (not ended or ended[-1] == "FINISHED")
