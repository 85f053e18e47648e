"""Seeded kills in every step of the pipeline: does the same command end with the same files after any kill?

    python benchmarks/kill_anywhere.py [--kills 26] [--seed 0] [--folder DIR] [--world-sizes]

A Ray cluster of a head and two nodes of one processor each on this machine, two workers, the demo at a small size. It
runs once undisturbed and once with kills: the driver with -9, SIGTERM or SIGHUP (then the same command again, at once
or after the processes it left have ended), a training rank or generation actor with -9 or SIGSTOP, a node with all its
processes with -9 (then replaced). Each step's moments are drawn from the seed: once a delay after its start, else a
share of its progress (files of the data folder, training steps, committed tasks). One more driver is killed after the
last marker. With --world-sizes a driver starts again with one worker and with two in turn; models and texts are then
not compared, because sums in another order round differently. Prints a line a kill and the results of all checks; ends
with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from data_shards.atomic_files import read_json
from launcher.config.chains import CHAINS
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir

SETTINGS = [
    "data.mini_sqa.num_train=480",
    "data.mini_sqa.num_val=120",
    "data.mini_sqa.num_test=240",
    "data.samples_per_shard=48",
    "rationale.num_steps=200",
    "answer.num_steps=150",
    "generation.task_samples=2",
    "generation.max_attempts=1000",
    "training.micro_batch_size=4",
    "training.log_every=1",
    "training.checkpoint_every=10",
    "training.validate_every=50",
    "training.max_failures=1000",
    "training.hang_timeout_s=30",
    "training.ledger=true",
    "generation.hang_timeout_s=30",
    "tracking.send_every_s=0.5",
]
KINDS = ("driver -9", "driver SIGTERM", "driver SIGHUP", "worker -9", "worker SIGSTOP", "node -9")
STEPS = CHAINS["two-stage"].steps
PLACES = [(step, kind) for step in STEPS for kind in (KINDS[:3] if step == "data" else KINDS)]
WAIT_S = 240


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill: at a share of the step's progress, or ``delay_s`` after the step's first line."""

    step: str
    kind: str
    share: float | None
    delay_s: float
    at_once: bool


def draw_kills(chance: random.Random, number: int) -> list[Kill]:
    """Every kind in every step first, then any; in the order in which they happen."""
    chosen = chance.sample(PLACES, min(number, len(PLACES))) + [
        chance.choice(PLACES) for _ in range(number - len(PLACES))
    ]
    kills = []
    for step in STEPS:
        kinds = [kind for place, kind in chosen if place == step]
        shares: list[float | None] = sorted(chance.uniform(0.03, 0.97) for _ in kinds[1:])
        # The data step's first line is printed after the build.
        shares.insert(len(shares) if step == "data" else 0, None)
        kills += [
            Kill(step, kind, share, chance.uniform(0, 2 if step == "data" else 6), chance.random() < 0.6)
            for kind, share in zip(kinds, shares, strict=False)
        ]
    return kills


class Pipeline:
    """The command under test, in its own folder, and the files of that folder."""

    def __init__(self, folder: Path, address: str, *, world_sizes: bool = False) -> None:
        self.folder, self.run_dir = folder, RunDir(folder / "runs" / "demo")
        changes = [*SETTINGS, f"cluster.address={address}"]
        self._command = [sys.executable, "-m", "launcher", "run", "--preset", "demo"]
        self._command += [part for change in changes for part in ("--set", change)]
        self.world_sizes, self.num_workers = world_sizes, 2
        folder.mkdir(parents=True)
        self.log = folder / "output.log"
        self.driver: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the driver; its output is appended to the log."""
        with open(self.log, "a") as log:
            environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
            command = [*self._command, "--set", f"cluster.num_workers={self.num_workers}"]
            self.driver = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment)

    def has_started(self, step: str) -> bool:
        """Whether the output contains the step's first line."""
        return f"] {step}\n" in self.log.read_text()

    def is_done(self, step: str) -> bool:
        """Whether the step has committed its marker."""
        return self.run_dir.marker(step) is not None

    def attempt(self) -> int:
        """The number of the current attempt, 0 before the first."""
        path = self.run_dir.path / "lock.json"
        return read_json(path)["attempt"] if path.exists() else 0

    def mlflow(self) -> MlflowClient:
        """A client of this run's MLflow store."""
        return MlflowClient(f"sqlite:///{self.folder / 'runs' / 'mlflow.db'}")

    def mlflow_status(self) -> str:
        """The parent run's status in the store."""
        path = self.run_dir.path / "mlflow.json"
        parent = read_json(path)["runs"].get("pipeline") if path.exists() else None
        return self.mlflow().get_run(parent).info.status if parent else "not open"

    def progress(self, step: str) -> int:
        """Files of the data folder, training steps or committed tasks."""
        if step == "data":
            names = [
                name for _, _, names in os.walk(self.folder / "data") for name in names
            ]  # a folder may be renamed meanwhile
            return sum("." in name and not name.startswith(".tmp-") for name in names)
        if step.startswith("train"):
            points = JournalReader(self.run_dir.journal(step.removeprefix("train-"))).read()
            return max((point["step"] for point in points if "loss" in point["metrics"]), default=0)
        folder = self.run_dir.texts(step) if step == "rationales" else self.run_dir.predictions / "parts"
        return sum(path.name[0] != "." for path in folder.glob("*/*.jsonl"))

    def starts(self, step: str) -> int:
        """How often rank 0 of a training was ready to continue; 0 for other steps."""
        log = self.run_dir.logs / f"{step.removeprefix('train-')}-rank0.log"
        return log.read_text().count("ready to continue") if step.startswith("train") and log.exists() else 0

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for a condition; a driver that ends, or a wait of minutes, ends this program."""
        deadline = time.time() + WAIT_S
        while not condition():
            status = self.driver.poll()
            if status not in (None, 0) or time.time() > deadline:
                reason = (
                    f"the driver ended with {status} by itself"
                    if status is not None
                    else f"hangs: {WAIT_S} s without {what}"
                )
                raise SystemExit(f"{reason}\n{self.log.read_text()[-3000:]}")
            time.sleep(0.02)


def raylets(cluster: Cluster) -> dict[int, Any]:
    """The worker nodes by their raylet's process id."""
    return {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}


def workers(cluster: Cluster) -> list[psutil.Process]:
    """Training ranks and generation actors; processes that are ending are left out."""
    found = []
    for process in (child for pid in raylets(cluster) for child in psutil.Process(pid).children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            if any(kind in " ".join(process.cmdline()) for kind in ("GenerationWorker", "TrainWorker")):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def cause(kill: Kill, pipeline: Pipeline, cluster: Cluster, chance: random.Random) -> str:
    """Cause a kill; returns a note to print, or nothing."""
    if kill.kind.startswith("worker"):
        pipeline.wait_for(lambda: workers(cluster) or pipeline.is_done(kill.step), "a worker")
        if not (found := workers(cluster)):
            return "no worker was running"
        process = chance.choice(found)
        process.send_signal(signal.SIGKILL if kill.kind.endswith("-9") else signal.SIGSTOP)
        return ""
    if kill.kind.startswith("node"):
        pid, node = chance.choice(sorted(raylets(cluster).items()))
        processes = psutil.Process(pid).children(recursive=True)
        node.kill_raylet()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        return ""
    number = {"-9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}[kill.kind.split()[1]]
    asked = time.time()
    pipeline.driver.send_signal(number)
    status = pipeline.driver.wait(timeout=WAIT_S)
    note = ""
    if number != signal.SIGKILL:
        note = f"status {status} after {time.time() - asked:.1f} s, MLflow {pipeline.mlflow_status()}"
    if not kill.at_once:
        time.sleep(10)
    if pipeline.world_sizes:
        pipeline.num_workers = 3 - pipeline.num_workers
        note += f", now {pipeline.num_workers} workers"
    pipeline.start()
    return note + (", restarted at once" if kill.at_once else ", restarted after 10 s")


def cause_at_its_moment(
    kill: Kill, pipeline: Pipeline, totals: dict[str, int], cluster: Cluster, chance: random.Random
) -> bool:
    """Wait for the kill's moment, cause it and wait for new progress; returns whether SIGTERM ended as it should."""
    step, at, ended_well = kill.step, round((kill.share or 0) * totals[kill.step]), True
    if kill.share is None:
        pipeline.wait_for(lambda: pipeline.has_started(step) or pipeline.is_done(step), f"the start of {step}")
        time.sleep(kill.delay_s)
    pipeline.wait_for(lambda: pipeline.progress(step) >= at or pipeline.is_done(step), f"{at} of {step}")
    before, starts = pipeline.progress(step), pipeline.starts(step)
    attempt, was_done = pipeline.attempt(), pipeline.is_done(step)
    caused = time.time()
    note = cause(kill, pipeline, cluster, chance)
    if kill.kind in ("driver SIGTERM", "driver SIGHUP"):  # in the data step it may come before MLflow is opened
        ended_well = was_done or ("status 143" in note and ("KILLED" in note or step == "data"))
    if kill.kind.startswith("driver"):
        pipeline.wait_for(lambda: pipeline.attempt() > attempt, "a new attempt")
        before = pipeline.progress(step)

    def continues() -> bool:
        ready = not step.startswith("train") or pipeline.starts(step) > starts
        return pipeline.is_done(step) or (ready and pipeline.progress(step) > before)

    pipeline.wait_for(continues, f"progress of {step}")
    moment = f"{kill.delay_s:.1f} s after its start" if kill.share is None else f"at {at} of {totals[step]}"
    note += ", the step was already done" if was_done else ""
    print(f"  {step:<16} {kill.kind:<15} {moment:<22} {time.time() - caused:5.1f} s  {note.strip(', ')}", flush=True)
    return ended_well


def run(pipeline: Pipeline, kills: list[Kill], totals: dict[str, int], cluster: Cluster, chance: random.Random) -> bool:
    """Run to the end with kills; returns whether SIGTERM ended as it should."""
    pipeline.start()
    ended_well = True
    for kill in kills:
        ended_well &= cause_at_its_moment(kill, pipeline, totals, cluster, chance)
    pipeline.wait_for(lambda: pipeline.is_done(STEPS[-1]), "the end")
    if kills:
        pipeline.driver.kill()
        pipeline.driver.wait()
        print(f"  {'the end':<16} driver -9       after the last marker", flush=True)
        pipeline.start()
    if status := pipeline.driver.wait(timeout=WAIT_S):
        raise SystemExit(f"the driver ended with {status}\n{pipeline.log.read_text()[-3000:]}")
    return ended_well


def digests(folder: Path, *patterns: str) -> dict[str, str]:
    """sha256 of every file of these patterns, temporary ones left out."""
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.name[0] != "."}
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def mlflow_faults(pipeline: Pipeline) -> list[str]:
    """What is wrong in the store: more runs than steps, a status, a point twice, a history that steps back."""
    client = pipeline.mlflow()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    steps = sorted(run.data.tags.get("mmcot.step", "parent") for run in runs)
    faults = [] if steps == sorted([*STEPS, "parent"]) else [f"runs: {steps}"]
    faults += [f"{run.info.run_name} is {run.info.status}" for run in runs if run.info.status != "FINISHED"]
    for run_ in runs:
        for key in run_.data.metrics:
            points = [metric.step for metric in client.get_metric_history(run_.info.run_id, key)]
            if points != sorted(set(points)):
                faults.append(f"{run_.info.run_name}: steps of {key} are {points}")
    return faults


def left_over(pipelines: list[Pipeline], cluster: Cluster) -> list[str]:
    """Drivers and workers that still run half a minute after the end."""
    folders, deadline = {str(pipeline.folder) for pipeline in pipelines}, time.time() + 30
    while True:
        drivers = [process for process in psutil.process_iter(["cwd"]) if process.info["cwd"] in folders]
        alive = [str(process) for process in (*workers(cluster), *drivers)]
        if not alive or time.time() > deadline:
            return alive
        time.sleep(1)


def ledger_faults(pipeline: Pipeline) -> list[str]:
    """What the ledger says of questions that were lost or trained on twice in an epoch."""
    command = [sys.executable, "-m", "launcher", "data", "ledger", str(pipeline.run_dir.path)]
    result = subprocess.run(command, capture_output=True, text=True)
    return [] if result.returncode == 0 else [(result.stdout + result.stderr).strip()]


def check_results(calm: Pipeline, disturbed: Pipeline, cluster: Cluster) -> dict[str, list[str]]:
    """What differs or is wrong, by check."""
    compared = {
        "data folder": (
            "data/mini_sqa-*/text/*",
            "data/mini_sqa-*/features/**/*",
            "data/mini_sqa-*/tokenizer/*",
            "data/mini_sqa-*/**/inputs.json",
            "data/*source*/**/*",
        ),
        "rationales": ("runs/demo/rationales/**/*",),
        "predictions": ("runs/demo/predictions/**/*",),
        "scores": ("runs/demo/scores*.json",),
        "models": ("runs/demo/*/model/*",),
    }
    found = {"ledger: every question exactly once an epoch": ledger_faults(disturbed)}
    if disturbed.world_sizes:
        compared = {"data folder": compared["data folder"]}
    for name, patterns in compared.items():
        one, other = digests(calm.folder, *patterns), digests(disturbed.folder, *patterns)
        found[f"{name} byte-equal ({len(one)} files)"] = sorted(
            path for path in {*one, *other} if one.get(path) != other.get(path)
        ) or ([] if one else ["none"])
    found["MLflow: one parent, a run a step, finished, no point twice, steps rising"] = mlflow_faults(disturbed)
    found["no process left"] = left_over([calm, disturbed], cluster)
    found["no staging or temporary file left"] = [
        str(path.relative_to(disturbed.folder))
        for pattern in (".tmp-*", ".staging-*")
        for path in disturbed.folder.rglob(pattern)
    ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=len(PLACES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--world-sizes", action="store_true")
    options = parser.parse_args()
    folder, chance, started = (
        Path(options.folder or tempfile.mkdtemp()).absolute(),
        random.Random(options.seed),
        time.time(),
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    calm = Pipeline(folder / "calm", cluster.address)
    disturbed = Pipeline(folder / "disturbed", cluster.address, world_sizes=options.world_sizes)
    try:
        run(calm, [], dict.fromkeys(STEPS, 0), cluster, chance)
        totals = {step: calm.progress(step) for step in STEPS}
        print(f"undisturbed: {time.time() - started:.0f} s, {totals}", flush=True)
        found = {
            "SIGTERM and SIGHUP end with 143 and KILLED": []
            if run(disturbed, draw_kills(chance, options.kills), totals, cluster, chance)
            else ["see above"]
        }
        found |= check_results(calm, disturbed, cluster)
        for name, wrong in found.items():
            print(f"{not wrong!s:<6} {name}{': ' + ', '.join(wrong[:6]) if wrong else ''}")
        print(f"seed {options.seed}, {options.kills} kills, {time.time() - started:.0f} s in all")
    finally:
        for pipeline in (calm, disturbed):
            if pipeline.driver and pipeline.driver.poll() is None:
                pipeline.driver.kill()
        cluster.shutdown()
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
