"""The processes of a training's ranks on Ray: their numbers and GPUs, lost ones, room for more."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from launcher.cluster import reservation
from launcher.cluster.auth_token import keep_token_private
from launcher.cluster.reservation import Place, PlacesLost, Reservation, release
from launcher.config.loading import load_settings
from launcher.runs.run_dir import RunDir
from launcher.training import ray_group
from launcher.training.ray_group import RankGroup, RanksFailed, StopRequested, rank_places
from launcher.training.ray_worker import Prepared


def prepared(node, *gpus):
    return Prepared(name="", node=node, pid=1, created=0.0, address="192.0.2.1", gpus=list(gpus))


def test_ranks_are_numbered_node_by_node_and_see_the_gpus_of_their_node():
    processes = {
        Place("g", 2, "b"): prepared("b", "3"),
        Place("g", 0, "a"): prepared("a", "1"),
        Place("g", 1, "b"): prepared("b", "0"),
    }
    found = rank_places(processes, "192.0.2.7", 29500)
    numbers = {place.bundle: dataclasses.astuple(rank)[:5] for place, rank in found.items()}
    assert numbers == {2: (0, 3, 0, 2, 0), 1: (1, 3, 1, 2, 0), 0: (2, 3, 0, 1, 1)}
    assert {place.bundle: rank.gpus for place, rank in found.items()} == {2: ["3", "0"], 1: ["3", "0"], 0: ["1"]}
    assert {(rank.address, rank.port) for rank in found.values()} == {("192.0.2.7", 29500)}


@contextlib.contextmanager
def meanwhile(act):
    """Run a function in a thread beside the block."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class Group:
    """A group whose ranks write what they got into a folder, and end once there is a file ``end``."""

    def __init__(self, folder, *, hang_timeout_s=120, **cluster):
        self.folder = folder
        settings = load_settings(preset="demo", overrides=[f"training.hang_timeout_s={hang_timeout_s}"])
        settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update=cluster)})
        self.job = SimpleNamespace(settings=settings, run_dir=str(folder), stage="rationale", attempt=1)
        self.lines: list[str] = []
        self.group = RankGroup(self.job, self.lines.append)

    def run(self):
        def work(job, *, rank, world_size, gpu_index):
            import json
            import os
            import time
            import uuid
            from pathlib import Path

            folder = Path(job.run_dir)
            given = {"rank": rank, "world_size": world_size, "gpu_index": gpu_index, "pid": os.getpid()}
            given |= {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "LOCAL_RANK")}
            (folder / ".draft").mkdir(exist_ok=True)
            draft = folder / ".draft" / uuid.uuid4().hex
            draft.write_text(json.dumps(given))
            draft.rename(folder / f"{time.time_ns()}-{rank}.rank")
            while not (folder / "end").exists():
                time.sleep(0.02)

        self.group.run(work)

    def starts(self):
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.rank"))]

    def wait_for(self, number):
        deadline = time.time() + 90
        while len(self.starts()) < number:
            assert time.time() < deadline, self.lines
            time.sleep(0.05)
        return self.starts()


@pytest.fixture
def ray_with_gpus():
    import ray

    keep_token_private()
    ray.init(address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
def test_a_lost_rank_is_replaced_by_a_process_that_stood_by_with_the_same_gpus(tmp_path, monkeypatch, ray_with_gpus):
    monkeypatch.setattr(ray_group, "STANDBY_AFTER_S", 0.0)
    one = Group(tmp_path, hang_timeout_s=20, use_gpu=True)
    named: list[str] = []

    def disturb():
        first = one.wait_for(2)
        while not any("StandbyWorker" in name for name in titles()):
            time.sleep(0.1)
        time.sleep(5)  # until they have loaded what they need; a process that still loads is taken as well
        os.kill(first[1]["pid"], signal.SIGKILL)
        one.wait_for(4)
        time.sleep(5)  # longer than the interval of looks at the ranks, at each of which Ray names the process anew
        named.extend(titles())
        (tmp_path / "end").touch()

    with meanwhile(disturb), one.group:
        with pytest.raises(RanksFailed, match=r"rank \d: "):
            one.run()
        one.run()
    starts = one.starts()
    by_rank = [{start["rank"]: start for start in half} for half in (starts[:2], starts[2:])]
    for rank in (0, 1):
        before, after = (half[rank] for half in by_rank)
        assert before["CUDA_VISIBLE_DEVICES"] == after["CUDA_VISIBLE_DEVICES"] in ("0,1", "1,0")
        assert before["gpu_index"] == after["gpu_index"] == rank and after["LOCAL_RANK"] == str(rank)
        assert before["pid"] != after["pid"] and after["MASTER_ADDR"] == "127.0.0.1"
    assert not any(psutil.pid_exists(start["pid"]) for start in starts[:2])
    assert all(any(f"ray::RayTrainWorker rationale rank {rank}" in name for name in named) for rank in (0, 1))


def titles():
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


@pytest.mark.ray
def test_a_stopped_rank_that_does_not_answer_is_lost_and_its_successor_ends_it(tmp_path, ray_up):
    one = Group(tmp_path, hang_timeout_s=6, num_workers=1)

    def disturb():
        os.kill(one.wait_for(1)[0]["pid"], signal.SIGSTOP)
        one.wait_for(2)
        (tmp_path / "end").touch()

    with meanwhile(disturb), one.group:
        with pytest.raises(RanksFailed, match=r"rank 0 \(process \d+ on .*\) does not answer"):
            one.run()
        one.run()
    assert not psutil.pid_exists(one.starts()[0]["pid"]) and one.lines == []


@pytest.mark.ray
def test_fewer_workers_train_until_there_is_room_for_all(tmp_path, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setattr(reservation, "FEWER_AFTER_S", 1.0)
    monkeypatch.setattr(ray_group, "GROW_AFTER_S", 0.0)
    keep_token_private()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    one = Group(tmp_path, num_workers=2, min_workers=1, address=cluster.address)

    def train():
        with one.group:
            one.run()

    thread = threading.Thread(target=train)
    thread.start()
    try:
        one.wait_for(1)
        cluster.add_node(num_cpus=1)
        one.wait_for(3)
    finally:
        (tmp_path / "end").touch()
        thread.join()
        ray.shutdown()
        cluster.shutdown()
    assert [start["world_size"] for start in one.starts()] == [1, 2, 2]
    assert one.lines == ["  there is room for more workers; starting again with them from the last checkpoint"]


@pytest.mark.ray
@pytest.mark.parametrize(("num_workers", "what"), [(9, "waits for room"), (1, "reads a model")])
def test_a_stop_that_is_requested_before_the_training_begins_ends_the_wait(
    num_workers, what, tmp_path, monkeypatch, ray_up
):
    monkeypatch.setattr(ray_group, "STOP_WITHIN_S", 1.0)
    one = Group(tmp_path, num_workers=num_workers)

    def ask():
        if what == "reads a model":
            one.wait_for(1)
        time.sleep(0.5)
        RunDir(tmp_path).request_stop(1)

    thread = threading.Thread(target=ask)
    thread.start()
    started = time.monotonic()
    with one.group, pytest.raises(StopRequested):
        one.run()
    thread.join()
    assert time.monotonic() - started < 30


@pytest.mark.ray
def test_a_reservation_gives_back_its_own_places_alone_and_notices_that_it_has_none(tmp_path, ray_up):
    cluster = load_settings(preset="demo").cluster.model_copy(update={"num_workers": 1})
    note = tmp_path / "note"
    former, later = Reservation(cluster, note), Reservation(cluster, note)  # of two attempts of a run
    former.close()
    assert len(later.wait(lambda line: None, lambda: None)) == 1 and note.exists()
    release(note)
    release(note)  # a second time, nothing is left to do
    with pytest.raises(PlacesLost, match="given back by another process"):
        later.wait(lambda line: None, lambda: None)
    later.close()
