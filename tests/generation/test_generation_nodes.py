"""The queue of tasks on a cluster whose nodes come and go, with workers that write without a model."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from data_shards.generated_texts import list_tasks, write_task
from data_shards.manifest import manifest_shards, read_manifest, shard_qids
from data_shards.sources.scienceqa import SPLITS
from data_shards.text_lines import read_lines
from launcher.cluster.ray_session import ray_session
from launcher.generation import text_tasks as generate
from launcher.generation.text_tasks import GenerationError, run_tasks
from launcher.runs.signals import Stopped, sigterm_stops
from launcher.stages.jobs import GenerationJob

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster():
    """A head without processors; tests add nodes of one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Adds nodes and knows those there are; removes them after a test."""
    yield cluster.worker_nodes
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


@pytest.fixture
def job(cluster, tiny_settings, tiny_data, tmp_path, monkeypatch):
    settings = tiny_settings.model_copy(
        update={"cluster": tiny_settings.cluster.model_copy(update={"address": cluster.address})}
    )
    monkeypatch.setattr(generate, "GenerationWorker", worker_without_model())
    return GenerationJob(
        stage="rationale",
        settings=settings,
        model_dir="none",
        shards_dir=str(tiny_data.path),
        output_dir=str(tmp_path / "out"),
    )


def worker_without_model():
    """A worker's class; local, so that it crosses to other processes by value."""

    class Worker:
        def __init__(self, job):
            self.job = job
            Path(job.output_dir).mkdir(exist_ok=True)
            Path(job.output_dir, f"started-{os.getpid()}").touch()

        def is_ready(self):
            return True

        def run(self, task):
            import ray

            time.sleep(0.1)
            folder = Path(self.job.shards_dir) / "text"
            shard = next(shard for shard in manifest_shards(read_manifest(folder)) if shard.name == task.shard)
            qids = shard_qids(folder, shard, "json")[task.start : task.start + task.num_samples]
            write_task(
                self.job.output_dir,
                task,
                [{"qid": qid, "rationale": qid, "num_tokens": 1, "finish": "eos"} for qid in qids],
            )
            with open(f"{self.job.output_dir}/computed", "a") as file:
                file.write(f"{ray.get_runtime_context().get_node_id()} {task.file_name}\n")
            return generate.TaskDone(
                generate._describe(Path(self.job.output_dir) / task.file_name, task, "rationale"), 0.1, 0.0
            )

    return Worker


def computed(job):
    """(node id, task) of everything that was computed, in order."""
    return [tuple(line.split()) for line in Path(job.output_dir, "computed").read_text().splitlines()]


def all_qids(job, tasks):
    return [line["qid"] for task in tasks for line in read_lines(f"{job.output_dir}/{task.file_name}")]


def test_a_node_lost_in_generation_loses_no_line_and_doubles_none(cluster, nodes, job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=2)
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    lost = []

    def lose_a_node(progress):
        *others, last = [node for node, _ in computed(job)]
        if not lost and progress.num_done >= 16:
            in_a_task = next((node for node in others if node != last), last)
            lost.extend(node for node in nodes if node.node_id == in_a_task)
            lost[0].kill_raylet()
            cluster.remove_node(lost[0], allow_graceful=False)
            cluster.add_node(num_cpus=1)

    with ray_session(job.settings.cluster):
        run_tasks(job, tasks, report=lose_a_node)
    qids = all_qids(job, tasks)
    assert lost and len(qids) == len(set(qids)) == 96
    assert len(computed(job)) <= len(tasks) + 1  # at most the task that the lost node was in came twice


@pytest.mark.slow  # Ray may take a minute to place a worker on a node that has just joined
def test_a_node_that_joins_later_takes_tasks(cluster, nodes, job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=2)
    cluster.add_node(num_cpus=1)
    joined = []

    def join(progress):
        if not joined:
            joined.append(cluster.add_node(num_cpus=1).node_id)
            deadline = time.time() + 60
            while time.time() < deadline and len(list(Path(job.output_dir).glob("started-*"))) < 2:
                time.sleep(0.05)

    with ray_session(job.settings.cluster):
        run_tasks(job, tasks, report=join)
    assert joined[0] in {node for node, _ in computed(job)}
    assert len(computed(job)) == len(set(all_qids(job, tasks))) / 2 == 48


def test_sigterm_stops_the_queue_and_the_same_call_goes_on(cluster, nodes, job):
    tasks = list_tasks(job.shards_dir, SPLITS, task_samples=8)
    cluster.add_node(num_cpus=1)
    timers = []

    def ask_to_stop(progress):
        if not timers:  # a moment later, when the driver waits for the next task
            timers.append(threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)))
            timers[0].start()

    with pytest.raises(Stopped, match="the same command resumes"), sigterm_stops(), ray_session(job.settings.cluster):
        run_tasks(job, tasks, report=ask_to_stop)
    assert 1 <= len(computed(job)) < len(tasks)
    with ray_session(job.settings.cluster):
        run_tasks(job, tasks)
    assert len(set(all_qids(job, tasks))) == 96 and len(computed(job)) <= len(tasks) + 1


def test_workers_that_always_fail_at_their_start_end_the_generation(cluster, nodes, job, monkeypatch):
    class Broken:
        def __init__(self, job):
            raise OSError("no such model")

        def is_ready(self):
            return True

    monkeypatch.setattr(generate, "GenerationWorker", Broken)
    cluster.add_node(num_cpus=1)
    tasks = list_tasks(job.shards_dir, ["val"], task_samples=8)
    with (
        ray_session(job.settings.cluster),
        pytest.raises(GenerationError, match=r"failed 3\S* times in a row before their first task[\s\S]*no such model"),
    ):
        run_tasks(job, tasks)
