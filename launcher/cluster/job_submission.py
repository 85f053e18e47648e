"""Submitting a run to a Ray cluster as a job, and following its output.

    submit_run(settings, address="http://127.0.0.1:8265")

A submission contains the resolved settings and the three packages as installed on this machine, which are the content
of the wheel. The workers of all nodes run this code, independently of the code in their image. A submission contains
no data: the folders in settings must be absolute paths that all nodes can read, or URLs. It contains no secret,
because Ray writes the environment of a job to its logs.
"""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.config.loading import (
    check_no_credentials,
    dump_settings,
    read_deepspeed,
    tracking_uri,
    value_of,
)
from launcher.config.settings import Settings, SettingsError
from launcher.runs.run_dir import RunDir
from launcher.runs.status import mlflow_lines
from mmcot.errors import OperationError

PACKAGES = ("launcher", "mmcot", "data_shards")
SETTINGS_FILE = "run.yaml"
# `ray job stop` sends SIGTERM, and SIGKILL after this time (by default 3 s); the ranks write a checkpoint before.
STOP_WAIT_S = 120
_RETRY_S = 2.0
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FOLDERS = (
    "run.dir",
    "data.path",
    "data.shards_dir",
    "data.vision_features",
    "data.captions",
    "data.cache_dir",
    "answer.rationales",
    "training.nvme_dir",
)
_IDS_OR_FOLDERS = ("model.pretrained", "data.vision_model")  # on the hub, or a folder


class SubmitError(OperationError):
    """The cluster does not accept the job; the message names the reason and the remedy."""


def submit_run(settings: Settings, *, address: str, follow: bool = True, report: Callable[[str], None] = print) -> int:
    """Run the pipeline on the cluster at ``address``; returns the run's exit status, or 0 without following it.

    Raises:
        SettingsError: a setting names a folder that the cluster's nodes cannot read.
        SubmitError: the cluster cannot be reached, or does not accept the job.
    """
    check_no_credentials("--address", address)
    if not address.startswith(("http://", "https://")):
        raise SettingsError(
            f"--address {address!r} must be that of the cluster's dashboard, such as http://127.0.0.1:8265"
        )
    settings = for_cluster(settings)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    with tempfile.TemporaryDirectory() as folder:
        write_package(Path(folder), settings)
        try:
            client = JobSubmissionClient(address)
            logging.getLogger("ray").setLevel(logging.WARNING)  # no lines on the upload of packages
            job = client.submit_job(
                entrypoint=f"python -m launcher run --config {SETTINGS_FILE}",
                submission_id=f"{settings.run.name}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}},
                metadata={"mmcot.run_dir": str(settings.run.dir)},
            )
        except (OSError, RuntimeError, RayError) as error:  # RayError: no token, or a wrong one
            raise SubmitError(
                f"the cluster at {address} does not accept the job: {error}\nIs its dashboard forwarded to this "
                "machine, and the token that of the cluster (RAY_AUTH_MODE=token, with RAY_AUTH_TOKEN or "
                "~/.ray/auth_token)?"
            ) from None
    report(f"job {job}, run {settings.run.dir}; the same command resumes it")
    report(
        f"  follow: ray job logs --follow --address {address} {job}    stop, with a checkpoint: ray job stop "
        f"--address {address} {job}"
    )
    for line in mlflow_lines(settings, RunDir(settings.run_dir)):
        report(f"  {line}")
    return _follow(client, job, report) if follow else 0


def for_cluster(settings: Settings) -> Settings:
    """Return the settings as the cluster's nodes read them.

    Raises:
        SettingsError: a setting names a folder of this machine, or is missing and its default is such a folder.
    """
    wrong = []
    for name in _FOLDERS:
        value = value_of(settings, name)
        if value is None and name in ("run.dir", "data.shards_dir"):  # their defaults are in the current folder
            wrong.append(f"{name} is not given")
        elif value is not None and not (
            Path(value).expanduser().is_absolute()
            or (name == "data.shards_dir" and "://" in value)
            or (name == "data.path" and value.startswith("hf://"))
        ):
            wrong.append(f"{name} is {value!r}")
    for name in _IDS_OR_FOLDERS:
        value = value_of(settings, name)
        if value is not None and not Path(value).is_absolute() and Path(value).is_dir():
            wrong.append(f"{name} is {value!r}, a folder of this machine")
    if wrong:
        raise SettingsError(
            "the cluster's nodes must see what the settings name: give absolute paths on storage that all of them "
            "share (data.shards_dir may be a URL, and data.path one of hf://), such as --set "
            f"run.dir=/mnt/mmcot/runs/{settings.run.name} --set "
            f"data.shards_dir=/mnt/mmcot/shards/{settings.run.name} ({'; '.join(wrong)})"
        )
    uri = tracking_uri(settings)  # the run uses this machine's MLFLOW_TRACKING_URI
    if urlsplit(uri).hostname in _LOOPBACK or re.match(r"sqlite:///(?!/)", uri):
        raise SettingsError(
            f"MLflow's address {uri} means another place on the cluster; give one that its head can reach "
            "(tracking.uri, or MLFLOW_TRACKING_URI), or none at all for SQLite beside the runs"
        )
    address = settings.cluster.address if settings.cluster.address != "local" else "auto"
    return settings.model_copy(
        update={
            "cluster": settings.cluster.model_copy(update={"address": address}),
            "tracking": settings.tracking.model_copy(update={"uri": uri}),
            "training": settings.training.model_copy(
                update={"deepspeed": read_deepspeed(settings.training.deepspeed) or None}
            ),
        }
    )


def write_package(folder: Path, settings: Settings) -> None:
    """Write the submission: the packages as installed on this machine, and the settings."""
    for name in PACKAGES:
        with resources.as_file(resources.files(name)) as source:
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    (folder / SETTINGS_FILE).write_text(dump_settings(settings), encoding="utf-8")


def _follow(client: Any, job: str, report: Callable[[str], None]) -> int:
    """Show a job's output until it ends, or until Ctrl-C, after which the job continues."""
    try:
        return _show_to_the_end(client, job, report)
    except KeyboardInterrupt:
        report(f"no longer following {job}; it continues")
        return 128 + signal.SIGINT


def _show_to_the_end(client: Any, job: str, report: Callable[[str], None]) -> int:
    """Show a job's output and return its exit status; a lost connection is retried."""
    from ray.exceptions import RayError

    num_shown, lost = 0, False

    async def show() -> None:
        nonlocal num_shown
        num_read = 0
        async for text in client.tail_job_logs(job):  # from the first line, each time
            num_read += len(text)
            if num_read > num_shown:
                report(text[num_shown - num_read :].rstrip("\n"))
                num_shown = num_read

    while True:
        try:
            asyncio.run(show())
            if (info := client.get_job_info(job)).status.is_terminal():
                break
            time.sleep(_RETRY_S)
        except Exception as error:  # of the tunnel or the head; the job may still be running
            if isinstance(error, RayError) or "status code 404" in str(error):
                report(
                    f"{job} can no longer be followed ({error}); if the cluster was restarted, the same command "
                    "resumes where the run stopped"
                )
                return 1
            if not lost:
                report(f"the connection is lost ({type(error).__name__}: {error}); trying again")
            lost = True
            time.sleep(_RETRY_S)
        else:
            lost = False
    if info.status == "SUCCEEDED":
        return 0
    report(f"job {job} {info.status.value.lower()}: {info.message}")
    return info.driver_exit_code or 1
