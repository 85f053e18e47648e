"""Jobs of a run's folder: checkpoints and their store, the start and the steps of a run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import types
from pathlib import Path

import torch
import torch.distributed as dist
from fault_jobs import contents
from fault_stand_ins import open_store

from data_shards.atomic_files import commit_folder, commit_json, read_json
from data_shards.errors import ShardError
from data_shards.leftovers import remove_leftovers
from launcher.cluster.gpus import with_device
from launcher.config.loading import load_settings
from launcher.pipeline.attempt import Attempt
from launcher.pipeline.pipeline import _same_settings
from launcher.runs import ownership
from launcher.runs.adoption import continue_here
from launcher.runs.checkpoint_names import checkpoints_by_step, name_of
from launcher.runs.exported import describe_export, verify_model
from launcher.runs.ownership import owned
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import has_begun
from launcher.runs.signals import Stopped, StopRequest, sigterm_stops
from launcher.tracking import run_log
from launcher.training import loop, opening
from launcher.training.best_model import BestLoss, kept_facts
from launcher.training.checkpoint_flight import CheckpointFlight
from launcher.training.checkpoint_resume import find_checkpoint, load_state
from launcher.training.checkpoint_store import fetch_best, fetch_checkpoint, is_behind, why_silent
from launcher.training.checkpoint_writer import HostCopies
from launcher.training.identity import claim_store

# A process that is stopped while it writes lock.json is continued by the trial, so its successor waits for it.
ownership.LOCK_WAIT_S = None

ROOT = "s3://bucket/demo-1-2"
STORE = f"{ROOT}/rationale"
IDENTITY = {"run_id": "0" * 32, "settings_fingerprint": "1", "data_fingerprint": "2"}
FACTS = {"world_size": 1, "zero_stage": 1, "precision": "fp32", "nvme": False, **IDENTITY}
FILE, NUM_STEPS = "mp_rank_00_model_states.pt", 4


def ignore(line) -> None:
    pass


class Inner:
    """DeepSpeed's checkpoint engine, as far as it is used."""

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)


class Engine:
    """Trains, saves and loads a tiny state, as DeepSpeed does."""

    def __init__(self):
        self.weights = torch.zeros(4)
        self.optimizer = types.SimpleNamespace(param_groups=[], state={})
        self.checkpoint_engine = HostCopies(Inner())

    def train(self, step):
        self.weights = self.weights / 2 + step

    def save_checkpoint(self, folder, *, tag, save_latest):
        self.checkpoint_engine.save({"weights": self.weights}, f"{folder}/{tag}/{FILE}")

    def load_checkpoint(self, folder, *, tag):
        self.weights = self.checkpoint_engine.load(f"{folder}/{tag}/{FILE}")["weights"].clone()
        return folder, {}


class Training:
    """The state of the loop, as far as checkpoints use it."""

    rank, world_size, late_upload, flight, store = 0, 1, None, None, STORE
    hang_guard = types.SimpleNamespace(progress=lambda: None, close=lambda: None)
    meter = types.SimpleNamespace(lap=lambda name: None)
    job = types.SimpleNamespace(stage="rationale")

    def __init__(self, run_dir, attempt):
        self.run_dir, self.best, self.last_checkpoint, self.store_is_away = run_dir, BestLoss(), 0, False
        self.checkpoints, self.may_commit = run_dir.checkpoints("rationale"), lambda: run_dir.check_attempt(attempt)

    @property
    def is_ready(self):
        return self.flight is not None and self.flight.is_ready

    def tell(self, step, text):
        pass

    def new_flight(self, step):
        best = self.run_dir.best_model("rationale")
        return CheckpointFlight(
            self.checkpoints, step=step, store=STORE, keep=2, may_commit=self.may_commit, best_folder=best
        )


def one_rank(folder: Path) -> None:
    open_store(folder / "store")
    loop.POLL_S = 0.002
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def train(folder: Path, *, take_over: bool = False) -> None:
    """Four steps with a checkpoint every second one, each copied to a store, in the order of the loop."""
    one_rank(folder)
    run_dir = RunDir(folder / "run")
    run_dir.path.mkdir(exist_ok=True)
    with owned(run_dir, take_over=take_over) as attempt, StopRequest(run_dir, attempt).listening() as stop:
        remove_leftovers(run_dir.path, staging=not take_over)
        if not run_dir.has_identity():
            run_dir.take_identity(IDENTITY["run_id"])
        this = Training(run_dir, attempt)
        try:
            claim_store(ROOT, run_dir, run_dir.identity())
        except ShardError:
            if not any(checkpoints_by_step(this.checkpoints)):
                raise
        if silence := why_silent(STORE):
            opening._without_store(this.checkpoints, silence)
            this.store_is_away = True
        else:
            fetch_checkpoint(STORE, this.checkpoints, may_commit=this.may_commit, facts=IDENTITY)
        found, engine = find_checkpoint(this.checkpoints, facts=FACTS, may_commit=this.may_commit), Engine()
        if found is not None:
            this.best = BestLoss.of_manifest(found.manifest)
            if this.best.step and opening._restore_best(this, found) is not None:
                this.best = BestLoss()
            load_state(engine, found)
            this.last_checkpoint = found.step
            if not silence and is_behind(STORE, found.step):
                this.flight = this.new_flight(found.step)
                this.flight.upload(this.best)
        for step in range(this.last_checkpoint, NUM_STEPS):
            done, stopping = step + 1, stop.seen()
            engine.train(step)
            if done == 2:
                this.best.add(done, 0.5, patience=None)
                _keep_best(this)
            if done % 2 == 0 or stopping:
                loop._commit(this)
                this.flight = this.new_flight(done)
                this.flight.begin(engine, facts={**FACTS, "validation": this.best.as_fact()}, best=this.best)
                loop._commit(this)
            if stopping and done < NUM_STEPS:
                raise Stopped("stopped")
        loop._commit(this)


def _keep_best(this: Training) -> None:
    best = this.run_dir.best_model("rationale")
    staging = best.with_name(".staging-best-model")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    commit_json(staging / "mmcot.json", {"step": this.best.step, "validation_loss": this.best.loss})
    this.may_commit()
    commit_folder(staging, best)


def read_checkpoints(folder: Path):
    """What a resume finds on this disk, and on an empty one with the store alone."""
    one_rank(folder)
    run_dir, empty = RunDir(folder / "run"), folder / ".empty"
    best = kept_facts(run_dir.best_model("rationale"))
    fetch_checkpoint(STORE, empty / "checkpoints", may_commit=lambda: None, facts=IDENTITY)
    states = [_states(run_dir.checkpoints("rationale")), _states(empty / "checkpoints")[-1:]]
    described = read_json(empty / "checkpoints" / states[1][0][0] / "manifest.json")["best"]
    fetch_best(STORE, described, empty / "best", may_commit=lambda: None)
    assert kept_facts(empty / "best") == best
    shutil.rmtree(empty)
    stored = _states(folder / "store" / STORE.removeprefix("s3://"))
    assert states[0][-1] == states[1][-1] == stored[-1], f"{states} {stored}"
    # A signal or a store that is away may change which older ones are kept; each is what a training has at its step.
    weights = torch.zeros(4)
    by_step = {name_of(step + 1): (weights := weights / 2 + step).tolist() for step in range(NUM_STEPS)}
    assert all(by_step[name] == found for name, found in [*states[0], *stored])
    return [len(states[0]), states[0][-1], best]


def _states(checkpoints: Path) -> list:
    """The newest checkpoint as a resume finds it, and the older ones, each verified in the same way."""
    found = []
    for path in checkpoints_by_step(checkpoints):
        with tempfile.TemporaryDirectory() as place:
            shutil.copytree(path, Path(place) / path.name)
            (Path(place) / "LATEST").write_text(path.name)
            if path == checkpoints_by_step(checkpoints)[-1]:
                shutil.copy(checkpoints / "LATEST", place)
            verified, engine = find_checkpoint(Path(place), facts=FACTS, may_commit=lambda: None), Engine()
            load_state(engine, verified)
            found.append([verified.path.name, engine.weights.tolist()])
    return found


def run_steps(folder: Path, *, take_over: bool = False) -> None:
    """A run from its first command to its end: two steps, one of which exports a model."""
    settings = load_settings(preset="demo", overrides=[f"run.dir={folder / 'run'}"])
    run_dir = RunDir(settings.run_dir)
    run_log.describe_environment = dict
    run_dir.path.mkdir(parents=True, exist_ok=True)
    if begun := has_begun(run_dir):
        settings = _same_settings(run_dir, settings, ignore)
    with sigterm_stops(), owned(run_dir, take_over=take_over) as number, contextlib.ExitStack() as resources:
        if not begun:
            settings = _same_settings(run_dir, settings, ignore)
        remove_leftovers(run_dir.path, staging=not take_over)
        continue_here(run_dir, report=ignore)
        settings = with_device(settings, run_dir, ignore, count=lambda cluster: (0, "this machine"))
        run_dir.identity()
        run_dir.rank_token()
        attempt = Attempt(settings, run_dir, number, ignore, resources, sends=False)
        attempt.run_step("data", {"text": "1"}, lambda child: {"text": "1"})
        attempt.run_step("train-rationale", {"data": "1"}, lambda child: _export(run_dir, number))
        attempt.verify_models()


def _export(run_dir: RunDir, attempt: int) -> dict:
    model = run_dir.model("rationale")
    staging = model.with_name(".staging-model")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    commit_json(staging / "config.json", {"dim": 4})
    (staging / "model.safetensors").write_bytes(b"weights")
    run_dir.check_attempt(attempt)
    commit_folder(staging, model)
    return describe_export("rationale", model)


def read_run(folder: Path):
    run_dir = RunDir(folder / "run")
    verify_model(run_dir.model("rationale"))
    markers = {step: run_dir.marker(step) for step in ("data", "train-rationale")}
    kept = {step: {name: marker[name] for name in ("step", "inputs", "outputs")} for step, marker in markers.items()}
    sizes = [len(run_dir.identity()), len(run_dir.rank_token())]
    assert read_json(run_dir.path / "lock.json")["released"]
    files = contents(run_dir.path)
    return [kept, sizes, files["run.yaml"], files["rationale/model/model.safetensors"]]
