"""The demo on a Ray cluster of two hosts that lose one twice, against the same run on one host.

The hosts are real to everything above the kernel (tests/helpers/hosts.py): own networks, processes, names. `ray start`
runs on each with token authentication, the run is sent by `mmcot submit`. It takes some ten minutes:
`make test-cluster`.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import Host, Network, network, why_not

from launcher.runs.journal import JournalReader

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif((reason := why_not()) is not None, reason=f"needs hosts of its own: {reason}"),
]

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent


def environment(folder: Path, token: str | None) -> dict[str, str]:
    """What a host's processes see: no proxy, no Ray of another, the cluster's token as a file."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "MLFLOW_")) and not name.lower().endswith("_proxy")
    }
    kept |= {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if token is None:
        return kept
    path = folder / f"token-{token[:4]}"
    path.write_text(token)
    path.chmod(0o600)
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


class Cluster:
    """A head that also works, and workers that come and go, one processor each."""

    def __init__(self, hosts: Network, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.environment = environment(folder, secrets.token_hex(16))
        self.head = self._start("head", "--head", "--port=6379", "--dashboard-host=127.0.0.1")

    def add_worker(self, name: str) -> Host:
        return self._start(name, f"--address={self.head.address}:6379")

    def _start(self, name: str, *how: str) -> Host:
        host = self.hosts.add(name)
        command = [
            "ray",
            "start",
            *how,
            f"--node-ip-address={host.address}",
            "--num-cpus=1",
            f"--object-store-memory={200 * 2**20}",
            "--disable-usage-stats",
        ]
        host.run(command, env=self.environment, timeout=120)
        return host


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def hosts(folder):
    with network(folder) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def on_one_host(hosts, folder):
    """The demo's run folder, by two workers of a Ray of their own on a host that has nothing else."""
    alone, run = hosts.add("alone"), folder / "alone-run"
    command = [
        "mmcot",
        "run",
        "--preset",
        "demo",
        "--set",
        f"run.dir={run}",
        "--set",
        f"data.shards_dir={folder / 'shards'}",
    ]
    log = folder / "alone.log"
    status = alone.start(command, log, env=environment(folder, None)).wait(1200)
    assert status == 0, log.read_text()[-4000:]
    hosts.lose(alone)
    return run


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, log: Path, *, timeout_s: float = 900) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"the run ended with status {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing for {timeout_s} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.2)


def steps_done(run: Path, stage: str) -> int:
    points = JournalReader(run / "logs" / f"{stage}-metrics.jsonl").read()
    return max((point["step"] for point in points if "loss" in point["metrics"]), default=0)


def command(*settings: str, folder: Path) -> list[str]:
    """Sends the demo to the cluster whose head it is run on."""
    given = [f"data.shards_dir={folder / 'shards'}", *settings]
    return [
        "mmcot",
        "submit",
        "--address",
        "http://127.0.0.1:8265",
        "--preset",
        "demo",
        *(word for setting in given for word in ("--set", setting)),
    ]


@pytest.fixture(scope="module")
def submit(on_a_cluster, folder):
    """Sends the demo again, with settings, and waits for its end."""
    _, _, cluster = on_a_cluster
    return lambda *settings: cluster.head.run(
        command(*settings, folder=folder), env=cluster.environment, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def on_a_cluster(on_one_host, hosts, folder):
    """The same run, sent to two hosts of which one is lost, and replaced, in stage one and in generation."""
    run, log, times = folder / "cluster-run", folder / "cluster.log", {}
    cluster = Cluster(hosts, folder)
    worker = cluster.add_worker("worker-1")
    process = cluster.head.start(command(f"run.dir={run}", folder=folder), log, env=cluster.environment)
    latest = run / "rationale" / "checkpoints" / "LATEST"
    wait_until(latest.exists, process, log)

    before = steps_done(run, "rationale")
    lost_at = time.monotonic()
    hosts.lose(worker)
    worker = cluster.add_worker("worker-2")
    wait_until(lambda: (run / "logs" / "train-rationale-system-worker-2.jsonl").exists(), process, log)
    wait_until(lambda: steps_done(run, "rationale") > before + 20, process, log)
    times["stage one"] = time.monotonic() - lost_at

    tasks = run / "rationales"
    wait_until(lambda: len(list(tasks.glob("*/*.jsonl"))) >= 2, process, log)
    assert not (run / "steps" / "rationales.json").exists()
    committed, lost_at = {path: path.stat().st_mtime_ns for path in tasks.glob("*/*.jsonl")}, time.monotonic()
    hosts.lose(worker)
    cluster.add_worker("worker-3")
    wait_until(lambda: (run / "steps" / "rationales.json").exists(), process, log)
    times["generation"] = time.monotonic() - lost_at
    assert committed == {path: path.stat().st_mtime_ns for path in committed}, (
        "a file that was committed was written again"
    )

    wait_until(lambda: process.poll() is not None or (run / "scores.json").exists(), process, log)
    status = process.wait(300)
    print(
        f"\nhosts lost: {times['stage one']:.0f} s until 20 new steps were done; "
        f"in generation ({len(committed)} files committed before) "
        f"the rest took {times['generation']:.0f} s"
    )
    assert status == 0, log.read_text()[-4000:]
    return run, log.read_text(), cluster


def test_two_hosts_that_lose_one_twice_make_the_scores_of_one_host(on_one_host, on_a_cluster):
    run, output, _ = on_a_cluster
    for name in ("scores.json", "scores.val.json"):
        assert json.loads((run / name).read_text()) == json.loads((on_one_host / name).read_text())
    assert (run / "predictions" / "test.jsonl").read_bytes() == (
        on_one_host / "predictions" / "test.jsonl"
    ).read_bytes()
    assert "a worker was lost; starting again from the last checkpoint" in output


def test_every_host_worked(on_a_cluster):
    run, _, _ = on_a_cluster
    trained = {path.name for path in (run / "logs").glob("train-*-system-*.jsonl")}
    assert {f"train-rationale-system-{name}.jsonl" for name in ("head", "worker-1", "worker-2")} <= trained
    assert {f"train-answer-system-{name}.jsonl" for name in ("head", "worker-3")} <= trained


def test_the_nodes_ran_the_code_that_was_sent(on_a_cluster):
    run, _, cluster = on_a_cluster
    for rank in (0, 1):
        joined = [
            line
            for line in (run / "logs" / f"rationale-rank{rank}.log").read_text().splitlines()
            if "joined its group" in line
        ]
        assert joined and all("/runtime_resources/working_dir_files/" in line for line in joined)
    sent = list((cluster.head.folder / "ray").glob("session_2*/runtime_resources/working_dir_files/*/launcher"))
    assert {path.name for path in sent[0].parent.iterdir()} - {"__pycache__"} == {
        "launcher",
        "mmcot",
        "data_shards",
        "run.yaml",
    }


def test_the_same_command_finds_nothing_to_do_and_other_settings_end_with_the_runs_own_error(on_a_cluster, submit):
    run, _, _ = on_a_cluster
    done = submit(f"run.dir={run}")
    assert done.returncode == 0 and "there is nothing to do" in done.stdout
    done = submit(f"run.dir={run}", "training.learning_rate=0.5")
    assert done.returncode == 1 and "training.learning_rate was" in done.stdout and "failed" in done.stdout


def test_a_wrong_token_and_none_are_refused(on_a_cluster, folder):
    _, _, cluster = on_a_cluster
    for token in ("0" * 32, None):
        refused = environment(folder, token)
        done = cluster.head.run(
            ["ray", "job", "list", "--address", "http://127.0.0.1:8265"], env=refused, check=False, timeout=60
        )
        assert done.returncode != 0 and "SUCCEEDED" not in done.stdout
        done = cluster.head.run(
            command(f"run.dir={folder / 'other'}", folder=folder), env=refused, check=False, timeout=60
        )
        assert done.returncode == 1 and "does not accept the job" in done.stderr and "Traceback" not in done.stderr
    done = cluster.head.run(
        ["ray", "job", "list", "--address", "http://127.0.0.1:8265"], env=cluster.environment, timeout=60
    )
    assert "SUCCEEDED" in done.stdout


def test_the_dashboard_is_not_reached_from_another_host(on_a_cluster):
    _, _, cluster = on_a_cluster
    reach = f"import socket; socket.create_connection(('{cluster.head.address}', 8265), timeout=5)"
    done = cluster.hosts.hosts[-1].run([sys.executable, "-c", reach], check=False)
    assert done.returncode != 0 and "refused" in done.stderr


def test_the_token_is_in_no_file_of_the_run_and_in_no_log(on_a_cluster):
    run, output, cluster = on_a_cluster
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text().encode()
    logs = [path for host in cluster.hosts.hosts for path in (host.folder / "ray").glob("session_2*/logs/**/*")]
    assert len(logs) > 10
    assert [path for path in [*run.rglob("*"), *logs] if path.is_file() and token in path.read_bytes()] == []
    assert token.decode() not in output
