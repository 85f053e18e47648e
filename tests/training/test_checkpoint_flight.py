"""A checkpoint's way to the disk and to the store behind the training, and back: one rank, no DeepSpeed."""

from __future__ import annotations

import errno
import shutil
import threading

import pytest
import torch
import torch.distributed as dist

from data_shards.atomic_files import commit_json, read_json
from data_shards.errors import ShardError
from data_shards.remote_files import list_names, put_bytes
from launcher.runs.checkpoint_names import CheckpointError
from launcher.runs.hang_guard import HangGuard
from launcher.runs.run_dir import RunError
from launcher.training import checkpoint_flight, checkpoint_store, checkpoint_writer, loop, opening
from launcher.training.best_model import BestLoss
from launcher.training.checkpoint import reserve_memory
from launcher.training.checkpoint_flight import CheckpointFlight
from launcher.training.checkpoint_resume import find_checkpoint, load_state
from launcher.training.checkpoint_store import fetch_best, fetch_checkpoint, is_behind
from launcher.training.checkpoint_writer import HostCopies
from launcher.training.throughput import Meter

FACTS = {"world_size": 1, "zero_stage": 1, "precision": "fp32", "nvme": False}
NAME = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    place = f"file://{tmp_path_factory.mktemp('group') / 'group'}"
    dist.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Inner:
    """DeepSpeed's checkpoint engine, as far as it is used."""

    def load(self, path, map_location=None):
        return torch.load(path, map_location=map_location, weights_only=True)


class Adam:
    """An optimizer without parameters."""

    def __init__(self):
        self.param_groups, self.state = [], {}


class Engine:
    """Saves and loads a state by its checkpoint engine, as DeepSpeed does."""

    def __init__(self, weights):
        self.weights, self.optimizer = torch.tensor(weights), Adam()
        self.checkpoint_engine = HostCopies(Inner())

    def zero_nvme_offload_optimizer(self):
        return False

    def save_checkpoint(self, folder, *, tag, save_latest):
        self.checkpoint_engine.save({"weights": self.weights}, f"{folder}/{tag}/{NAME}")

    def load_checkpoint(self, folder, *, tag):
        state = self.checkpoint_engine.load(f"{folder}/{tag}/{NAME}")
        assert self.checkpoint_engine.load(f"{folder}/{tag}/{NAME}")["weights"].equal(state["weights"])
        self.weights = state["weights"].clone()
        return folder, {}


@pytest.fixture
def make_flight(tmp_path, s3):
    """A function that makes a checkpoint's flight to a store of this test."""

    def make(step, *, store=True):
        url = f"s3://bucket/flights/{tmp_path.name}/rationale" if store else None
        return CheckpointFlight(
            tmp_path / "checkpoints",
            step=step,
            store=url,
            keep=2,
            may_commit=lambda: None,
            best_folder=tmp_path / "best",
        )

    make.url = f"s3://bucket/flights/{tmp_path.name}/rationale"
    return make


def keep_best(folder, step, loss, weights=b"weights"):
    commit_json(folder / "mmcot.json", {"step": step, "validation_loss": loss})
    (folder / "model.safetensors").unlink(missing_ok=True)  # a new file, as a new folder has
    (folder / "model.safetensors").write_bytes(weights)
    return BestLoss(loss=loss, step=step)


def fly(flight, best=None, weights=(1.0, 2.0)):
    flight.begin(Engine(weights), facts=FACTS, best=best or BestLoss())
    while not flight.is_done:
        flight.advance()


def find(tmp_path):
    return find_checkpoint(tmp_path / "checkpoints", facts=FACTS, may_commit=lambda: None)


# To the store


def test_the_training_goes_on_while_the_store_takes_its_time_and_latest_comes_last(make_flight, monkeypatch):
    may_put, put_file = threading.Event(), checkpoint_store.put_file
    monkeypatch.setattr(checkpoint_store, "put_file", lambda *values: may_put.wait(20) and put_file(*values))
    flight = make_flight(2)
    flight.begin(Engine([1.0]), facts=FACTS, best=BestLoss())
    flight.wait()
    flight.advance()
    assert flight.is_committed and not flight.is_ready and not flight.is_done
    assert list_names(make_flight.url) == []
    may_put.set()
    flight.wait()
    assert flight.is_ready and list_names(make_flight.url) == ["step-000002"]  # its files, and nothing that names it
    flight.advance()
    flight.wait()
    assert list_names(make_flight.url) == ["LATEST", "step-000002"]
    flight.advance()
    assert flight.is_done


def test_a_store_that_refuses_is_named_and_the_checkpoint_on_disk_is_kept(make_flight, tmp_path, monkeypatch):
    def refuse(path, url):
        raise ShardError(f"{url} may not be written")

    monkeypatch.setattr(checkpoint_store, "put_file", refuse)
    flight = make_flight(2)
    fly(flight)
    assert "state/mp_rank_00_model_states.pt may not be written" in flight.store_failure and not flight.is_stored
    assert find(tmp_path).step == 2 and is_behind(make_flight.url, 2)


def test_what_another_run_writes_to_the_store_ends_the_training(make_flight, monkeypatch):
    def refuse(url, run_id):
        raise RunError("the store's folder is another run's")

    monkeypatch.setattr(checkpoint_store, "check_writer", refuse)
    with pytest.raises(RunError, match="another run's"):
        fly(make_flight(2))


class Waiting:
    """A state of the loop with a checkpoint in flight, and the notes it made."""

    rank, world_size, store_is_away, late_upload, last_checkpoint = 0, 1, False, None, 0

    def __init__(self, flight):
        self.flight, self.notes = flight, []
        self.hang_guard, self.meter = HangGuard(60), Meter(peak_flops=1.0)
        flight.begin(Engine([1.0]), facts=FACTS, best=BestLoss())

    @property
    def is_ready(self):
        return self.flight.is_ready

    def tell(self, step, text):
        self.notes.append(text)


def test_a_silent_store_is_waited_for_with_notes_then_given_up_and_the_next_checkpoint_is_stored(
    make_flight, tmp_path, monkeypatch
):
    may_put, put_file = threading.Event(), checkpoint_store.put_file
    monkeypatch.setattr(checkpoint_store, "put_file", lambda *values: may_put.wait(20) and put_file(*values))
    monkeypatch.setattr(loop, "STORE_WAIT_S", 0.6)
    monkeypatch.setattr(loop, "STORE_NOTE_S", 0.2)
    this = Waiting(make_flight(2))
    loop._commit(this)
    assert this.flight is None and this.store_is_away and not this.late_upload.is_done
    assert "waiting for the object store" in this.notes[0] and "no answer in 1 s" in this.notes[-1]
    assert find(tmp_path).step == 2
    may_put.set()
    this.late_upload.wait()
    later = Waiting(make_flight(4))
    later.store_is_away = True
    loop._commit(later)
    assert later.notes[-1] == "the object store has the checkpoint of step 4 again" and not later.store_is_away
    assert not is_behind(make_flight.url, 4)
    this.hang_guard.close()


def test_a_store_that_does_not_answer_is_told_from_an_empty_one(make_flight, monkeypatch):
    assert checkpoint_store.why_silent(make_flight.url) is None
    monkeypatch.setattr(checkpoint_store, "ANSWER_S", 0.1)
    released = threading.Event()
    monkeypatch.setattr(checkpoint_store, "_latest", lambda url: released.wait(20))
    assert "gave no answer in 0 s" in checkpoint_store.why_silent(make_flight.url)
    released.set()


def test_a_training_starts_without_its_store_from_disk_alone(make_flight, tmp_path):
    with pytest.raises(CheckpointError, match="store is away, and .* holds no checkpoint; wait until"):
        opening._without_store(tmp_path / "checkpoints", "the store is away")
    fly(make_flight(2, store=False))
    assert "continues from" in opening._without_store(tmp_path / "checkpoints", "the store is away")


def test_what_a_kill_kept_from_the_store_is_copied_after_the_start(make_flight, tmp_path):
    best = keep_best(tmp_path / "best", 1, 0.5)
    fly(make_flight(2), best)
    put_bytes(b"step-000001\n", f"{make_flight.url}/LATEST")
    assert is_behind(make_flight.url, 2)
    (tmp_path / "checkpoints" / ".staging-000002-0f5c0f5c-best").mkdir()  # of the process that was killed
    flight = make_flight(2)
    flight.upload(best)
    while not flight.is_done:
        flight.advance()
    assert not is_behind(make_flight.url, 2) and not list((tmp_path / "checkpoints").glob(".staging-*"))


# The best model


def test_the_best_model_travels_with_the_checkpoint_that_names_it_and_old_ones_are_removed(make_flight, tmp_path):
    counted = []
    for step in (2, 4, 6, 8):
        best = keep_best(tmp_path / "best", min(step, 6), 1 / min(step, 6), b"%d" % min(step, 6))
        fly(make_flight(step), best)
        counted.append([name[:11] for name in list_names(make_flight.url) if name.startswith("best-")])
    assert counted == [["best-000002"], ["best-000002", "best-000004"], ["best-000004", "best-000006"], ["best-000006"]]
    fetch_checkpoint(make_flight.url, tmp_path / "empty", may_commit=lambda: None)
    described = read_json(tmp_path / "empty" / "step-000008" / "manifest.json")["best"]
    fetch_best(make_flight.url, described, tmp_path / "fetched", may_commit=lambda: None)
    assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == b"6"
    assert not list((tmp_path / "checkpoints").glob(".staging-*"))


def test_a_best_model_that_is_in_the_store_is_not_copied_again(make_flight, tmp_path, monkeypatch):
    best, urls, put_file = keep_best(tmp_path / "best", 1, 0.5), [], checkpoint_store.put_file
    monkeypatch.setattr(checkpoint_store, "put_file", lambda path, url: (urls.append(url), put_file(path, url)))
    fly(make_flight(2), best)
    assert len([url for url in urls if "/best-" in url]) == 2
    fly(make_flight(4), best)
    assert len([url for url in urls if "/best-" in url]) == 2


def test_a_better_model_may_replace_the_best_one_while_that_is_copied(make_flight, tmp_path):
    flight = make_flight(2)
    flight.begin(Engine([1.0]), facts=FACTS, best=keep_best(tmp_path / "best", 2, 0.5, b"of step 2"))
    keep_best(tmp_path / "best", 3, 0.4, b"of step 3")
    while not flight.is_done:
        flight.advance()
    described = read_json(tmp_path / "checkpoints" / "step-000002" / "manifest.json")["best"]
    fetch_best(make_flight.url, described, tmp_path / "fetched", may_commit=lambda: None)
    assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == b"of step 2"


def test_an_altered_best_model_is_not_used(make_flight, tmp_path):
    fly(make_flight(2), keep_best(tmp_path / "best", 2, 0.5))
    described = read_json(tmp_path / "checkpoints" / "step-000002" / "manifest.json")["best"]
    put_bytes(b"altered", f"{make_flight.url}/{described['folder']}/model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors is not the file that was copied"):
        fetch_best(make_flight.url, described, tmp_path / "fetched", may_commit=lambda: None)
    assert not (tmp_path / "fetched").exists()


@pytest.mark.parametrize(
    "described",
    [
        {"folder": "../step-000002", "files": {}},
        {"folder": "best-000002-0123456789abcdef", "files": {"../../x": {"sha256": ""}}},
    ],
)
def test_a_manifest_cannot_name_a_best_model_elsewhere(make_flight, tmp_path, described):
    with pytest.raises(CheckpointError, match="names"):
        fetch_best(make_flight.url, described, tmp_path / "fetched", may_commit=lambda: None)


# The disk


def test_a_disk_that_gets_full_behind_the_training_is_explained_and_the_last_checkpoint_is_kept(
    make_flight, tmp_path, monkeypatch
):
    fly(make_flight(2, store=False))

    def full(state, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_hashed", full)
    flight = make_flight(4, store=False)
    flight.begin(Engine([9.0, 9.0]), facts=FACTS, best=BestLoss())
    flight.wait()
    with pytest.raises(
        CheckpointError, match=r"checkpoint of step 4 could not be written .* GB free\).*step-000002 is kept: free disk"
    ):
        flight.advance()
    assert not list((tmp_path / "checkpoints").glob(".staging-*"))  # its part of the disk is free again
    found, engine = find(tmp_path), Engine([0.0, 0.0])
    load_state(engine, found)
    assert found.step == 2 and engine.weights.tolist() == [1.0, 2.0]


# Verified while it is loaded


def test_what_is_loaded_is_what_was_verified_though_the_file_is_altered_meanwhile(make_flight, tmp_path):
    fly(make_flight(2, store=False))
    found, engine = find(tmp_path), Engine([0.0, 0.0])
    path = tmp_path / "checkpoints" / "step-000002" / "state" / NAME
    path.write_bytes(b"a pickle of somebody else")
    load_state(engine, found)
    assert engine.weights.tolist() == [1.0, 2.0]


def test_nothing_is_opened_before_it_is_verified(make_flight, tmp_path, monkeypatch):
    fly(make_flight(2, store=False))
    fly(make_flight(4, store=False), weights=(3.0, 4.0))
    path = tmp_path / "checkpoints" / "step-000004" / "state" / NAME
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    opened, load = [], Inner.load
    monkeypatch.setattr(Inner, "load", lambda *values: (opened.append(values[1]), load(*values))[1])
    found = find(tmp_path)
    assert (
        opened == [] and found.step == 2 and f"step-000004 is damaged ({NAME} is missing or altered" in found.notes[0]
    )
    load_state(Engine([0.0, 0.0]), found)
    assert len(opened) == 1


def test_without_memory_to_hold_them_files_are_read_again(make_flight, tmp_path, monkeypatch):
    fly(make_flight(2, store=False))
    monkeypatch.setattr("launcher.training.host_memory.KEPT_FREE_BYTES", 10**15)
    found, engine = find(tmp_path), Engine([0.0, 0.0])
    path = tmp_path / "checkpoints" / "step-000002" / "state" / NAME
    assert path not in found.held
    load_state(engine, found)
    assert engine.weights.tolist() == [1.0, 2.0]


# The memory of the first checkpoint


def test_the_first_checkpoint_is_copied_into_memory_that_was_got_ahead(make_flight):
    engine = Engine([1.0, 2.0])
    reserve_memory(engine)
    engine.checkpoint_engine.wait_for_memory()
    (reserved,) = next(iter(engine.checkpoint_engine._free.values()))
    place = reserved.data_ptr()
    flight = make_flight(2, store=False)
    flight.begin(engine, facts=FACTS, best=BestLoss())
    flight.advance()
    assert [tensor.data_ptr() for tensors in engine.checkpoint_engine._free.values() for tensor in tensors] == [place]


def test_without_room_nothing_is_reserved(monkeypatch):
    engine = Engine([1.0, 2.0])
    monkeypatch.setattr("launcher.training.host_memory.KEPT_FREE_BYTES", 10**15)
    reserve_memory(engine)
    engine.checkpoint_engine.wait_for_memory()
    assert not any(engine.checkpoint_engine._free.values())


def test_a_failure_of_a_part_is_told_by_the_next_phase(make_flight, monkeypatch):
    def fail(*values, **named):
        raise ShardError("LATEST could not be written in 5 tries")

    monkeypatch.setattr(checkpoint_flight, "publish_checkpoint", fail)
    flight = make_flight(2)
    fly(flight)
    assert flight.store_failure == "LATEST could not be written in 5 tries"


def test_of_a_store_with_copies_that_a_kill_cut_short_the_published_checkpoint_is_kept(make_flight):
    for cut_short in ("step-000002", "step-000437", "step-000500"):
        put_bytes(b"part", f"{make_flight.url}/{cut_short}/state/{NAME}")
    for step in (400, 420):
        flight = make_flight(step)
        flight.begin(Engine([1.0]), facts=FACTS | {"run_id": "a"}, best=BestLoss())
        while not flight.is_done:
            flight.wait()
            flight.advance()
    assert list_names(make_flight.url) == ["LATEST", "step-000400", "step-000420"]


# A manifest that was altered


def test_a_checkpoint_whose_manifest_was_altered_is_not_used_and_the_one_before_is(make_flight, tmp_path):
    fly(make_flight(2, store=False))
    fly(make_flight(4, store=False), weights=(3.0, 4.0))
    path = tmp_path / "checkpoints" / "step-000004" / "manifest.json"
    commit_json(path, {**read_json(path), "step": 3})
    found = find(tmp_path)
    assert (
        found.step == 2 and "step-000004 is damaged (manifest.json: its content has the fingerprint" in found.notes[0]
    )


def test_a_checkpoint_under_the_name_of_another_step_is_not_used(make_flight, tmp_path):
    fly(make_flight(2, store=False))
    fly(make_flight(4, store=False))
    folder = tmp_path / "checkpoints"
    (folder / "step-000004").rename(folder / "step-000006")
    (folder / "LATEST").write_text("step-000006\n")
    found = find(tmp_path)
    assert found.step == 2 and "step-000006 is damaged (manifest.json is of step 4)" in found.notes[0]


def test_a_latest_without_any_checkpoint_does_not_start_at_0_in_silence(make_flight, tmp_path):
    fly(make_flight(2, store=False))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match=r"LATEST names step-000002, and .* holds no checkpoint; restore it, or"):
        find(tmp_path)


def test_a_latest_without_any_checkpoint_is_filled_from_the_store(make_flight, tmp_path):
    fly(make_flight(2))
    shutil.rmtree(tmp_path / "checkpoints" / "step-000002")
    fetch_checkpoint(make_flight.url, tmp_path / "checkpoints", may_commit=lambda: None)
    assert find(tmp_path).step == 2
