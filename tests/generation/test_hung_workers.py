"""The queue's deadline on real Ray workers: who makes no progress is replaced, who makes some never is."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from launcher.cluster.ray_session import ray_session
from launcher.cluster.worker_pool import WorkersError, run_on_workers

pytestmark = pytest.mark.ray
TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def cluster():
    """A head without processors, and a node of one: what a worker has, its successor lacks until it is gone."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def settings(cluster, tiny_settings):
    settings = tiny_settings.cluster.model_copy(update={"address": cluster.address, "num_workers": 1})
    with ray_session(settings):
        yield settings


@pytest.fixture
def run(settings, tmp_path):
    """Runs tasks 0 to 3 by workers of a class; returns what was set aside, the results, and what a person was told."""

    def run(worker_class, **changes):
        results, lines = {}, []
        set_aside = run_on_workers(
            worker_class,
            str(tmp_path),
            dict.fromkeys(range(4), 1.0),
            gpus_per_worker=1,
            **{"cluster": settings, "max_attempts": 2, "hang_timeout_s": TIMEOUT_S, "report": lines.append} | changes,
            is_committed=lambda task: (tmp_path / f"{task}.txt").exists(),
            done=lambda task, result: results.setdefault(task, result),
        )
        return set_aside, results, lines

    return run


def worker_that(*, starts=lambda folder: None, runs=lambda worker, folder, task: None):
    """A worker's class."""

    class Writes:
        def __init__(self, job):
            self.folder = Path(job)
            (self.folder / f"pid-{os.getpid()}").touch()
            starts(self.folder)

        def is_ready(self):
            return True

        def run(self, task):
            runs(self, self.folder, task)
            (self.folder / f"{task}.txt").write_text("written")
            return task * 10

    return Writes


def first_time(folder):
    """True once in a test, whichever process asks."""
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


ALL = {task: task * 10 for task in range(4)}


def test_a_worker_that_blocks_is_replaced_its_task_run_again_and_its_stacks_are_kept(run):
    import ray

    def blocks_once(worker, folder, task):
        if task == 2 and first_time(folder):
            threading.Event().wait()

    set_aside, results, lines = run(worker_that(runs=blocks_once))
    assert set_aside == {} and results == ALL
    assert len(lines) == 1 and re.search(
        r"a worker is replaced: process \d+ on .* made no progress for 2 s \(generation\.hang_timeout_s\)", lines[0]
    )
    pid = re.search(r"process (\d+)", lines[0])[1]
    logs = Path(ray._private.worker.global_worker.node.get_logs_dir_path())
    stacks = "".join(path.read_text() for path in logs.glob(f"worker-*-{pid}.err"))
    assert "Timeout (0:00:02)!" in stacks and "blocks_once" in stacks


def test_a_task_that_always_blocks_is_set_aside_saying_so_and_the_others_are_done(run):
    def blocks(worker, folder, task):
        if task == 2:
            threading.Event().wait()

    set_aside, results, lines = run(worker_that(runs=blocks))
    assert list(set_aside) == [2] and "made no progress for 2 s" in set_aside[2]
    assert results == {task: result for task, result in ALL.items() if task != 2} and len(lines) == 2


def test_a_stopped_process_is_seen_though_it_can_tell_nothing_and_is_ended(run, tmp_path):
    def stops_once(worker, folder, task):
        if task == 0 and first_time(folder):
            os.kill(os.getpid(), signal.SIGSTOP)
            threading.Event().wait()  # this thread may run on for a moment

    set_aside, results, lines = run(worker_that(runs=stops_once))
    assert set_aside == {} and results == ALL and len(lines) == 1
    pid = int(re.search(r"process (\d+)", lines[0])[1])
    deadline = time.time() + 20
    while psutil.pid_exists(pid) and time.time() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def test_a_slow_worker_that_makes_progress_outlives_the_deadline(run):
    def is_slow(worker, folder, task):
        until = time.time() + (2 * TIMEOUT_S if task == 1 else 0)
        while time.time() < until:
            worker.progress()
            time.sleep(TIMEOUT_S / 20)

    assert run(worker_that(runs=is_slow)) == ({}, ALL, [])


def test_a_start_that_blocks_is_tried_again_and_given_up_where_it_always_does(run):
    def blocks_once(folder):
        if first_time(folder):
            threading.Event().wait()

    _set_aside, results, lines = run(worker_that(starts=blocks_once))
    assert results == ALL and len(lines) == 1
    with pytest.raises(
        WorkersError, match=r"failed 2 times in a row before their first task; the last:\n.*made no progress for 2 s"
    ):
        run(worker_that(starts=lambda folder: threading.Event().wait()))


def test_a_model_that_still_arrives_is_progress(run):
    def downloads(folder):
        until = time.time() + 2 * TIMEOUT_S
        while time.time() < until:
            (folder / "model").write_bytes(bytes(2 << 20))
            time.sleep(TIMEOUT_S / 20)

    assert run(worker_that(starts=downloads)) == ({}, ALL, [])


def test_a_worker_that_waits_for_a_free_processor_has_not_started_and_is_waited_for(run):
    import ray

    class Other:
        def is_there(self):
            return True

    other = ray.remote(num_cpus=1)(Other).remote()
    assert ray.get(other.is_there.remote())
    timer = threading.Timer(2 * TIMEOUT_S, ray.kill, (other,))
    timer.start()
    assert run(worker_that()) == ({}, ALL, [])
    timer.join()
