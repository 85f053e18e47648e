"""deploy/slurm.sh, run for real on two hosts; Slurm's own commands are stand-ins.

`srun` hands its command to this process, which starts it on every host with the job's environment and answers with the
highest status, as Slurm would. Ray, its token and the run are the real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hosts import Host, network, why_not

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif((reason := why_not()) is not None, reason=f"needs hosts of its own: {reason}"),
]

ROOT = Path(__file__).parents[2]
STAND_INS = {
    "srun": """#!{python}
import json, os, pathlib, sys, time
folder, words = pathlib.Path("{folder}"), sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
(folder / "request.tmp").write_text(json.dumps({{"command": words, "environment": dict(os.environ)}}))
(folder / "request.tmp").rename(folder / "request")
while not (folder / "answer").exists():
    time.sleep(0.1)
sys.exit(int((folder / "answer").read_text()))
""",
    "scontrol": """#!/bin/sh
echo "$*" >> "{folder}/scontrol.log"
if [ "$1 $2" = "show hostnames" ]; then echo "$3" | tr , '\\n'; fi
""",
}
RUN = [
    "--preset",
    "demo",
    "--set",
    "data.mini_sqa.num_train=64",
    "--set",
    "data.mini_sqa.num_val=16",
    "--set",
    "data.mini_sqa.num_test=16",
    "--set",
    "data.samples_per_shard=24",
    "--set",
    "rationale.num_steps=200",
    "--set",
    "answer.num_steps=5",
    "--set",
    "rationale.max_target_tokens=16",
    "--set",
    "cluster.num_workers=2",
    "--set",
    "training.log_every=1",
    "--set",
    "tracking.register_models=false",
]


class Slurm:
    """Starts batch jobs on the first of its hosts and their steps on all."""

    def __init__(self, hosts: list[Host], folder: Path) -> None:
        self.hosts, self._folder = hosts, folder
        self.log = folder / "job.log"
        self.commands = folder / "scontrol.log"
        for name, text in STAND_INS.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text.format(python=sys.executable, folder=folder))
            path.chmod(0o755)

    def submit(self, *arguments: str) -> subprocess.Popen:
        """As `sbatch --nodes=2 deploy/slurm.sh ARGUMENTS`; the process is the batch script's."""
        for name in ("request", "answer"):
            (self._folder / name).unlink(missing_ok=True)
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "MLFLOW_")) and "proxy" not in name.lower()
        }
        environment |= {
            "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self._folder),
            "PYTHONPATH": str(ROOT),
            "MMCOT_ENV": str(Path(sys.prefix)),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": str(len(self.hosts)),
            "SLURM_JOB_NODELIST": ",".join(host.name for host in self.hosts),
            "SLURM_CPUS_PER_TASK": "1",
            "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT": "30",  # nodes that wait for a Ray that never comes
        }
        process = self.hosts[0].start(
            ["bash", str(ROOT / "deploy" / "slurm.sh"), *arguments], self.log, env=environment
        )
        threading.Thread(target=self._run_step, args=(process,), daemon=True).start()
        return process

    def _run_step(self, job: subprocess.Popen) -> None:
        while not (self._folder / "request").exists():
            if job.poll() is not None:
                return
            time.sleep(0.1)
        request = json.loads((self._folder / "request").read_text())
        tasks = [
            host.start(request["command"], self._folder / f"task-{host.name}.log", env=request["environment"])
            for host in self.hosts
        ]
        (self._folder / "answer.tmp").write_text(str(max(task.wait() for task in tasks)))
        (self._folder / "answer.tmp").rename(self._folder / "answer")


@pytest.fixture
def slurm(tmp_path):
    with network(tmp_path) as hosts:
        yield Slurm([hosts.add("node-a"), hosts.add("node-b")], tmp_path)


def output_of(slurm: Slurm, tmp_path: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in [slurm.log, *tmp_path.glob("task-*.log")])


def test_a_job_whose_time_is_up_stops_with_a_checkpoint_queues_again_and_then_finishes(slurm, tmp_path):
    run = tmp_path / "run"
    arguments = [*RUN, "--set", f"run.dir={run}", "--set", f"data.shards_dir={tmp_path / 'shards'}"]
    job = slurm.submit(*arguments)
    journal = run / "logs" / "rationale-metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (journal.exists() and '"loss"' in journal.read_text()):
        assert job.poll() is None and time.monotonic() < deadline, output_of(slurm, tmp_path)
        time.sleep(0.2)
    batch = slurm.hosts[0].run(["pgrep", "-f", "^bash .*slurm.sh"]).stdout.split()[0]
    slurm.hosts[0].run(["kill", "-TERM", batch])
    assert job.wait(120) == 128 + signal.SIGTERM, output_of(slurm, tmp_path)
    assert slurm.commands.read_text().splitlines()[-1] == "requeue 7"
    stopped_at = int((run / "rationale" / "checkpoints" / "LATEST").read_text().removeprefix("step-"))
    assert 0 < stopped_at < 200 and not (run / "steps" / "train-rationale.json").exists()
    assert not (tmp_path / ".mmcot" / "slurm-7").exists(), "the job's token is gone with it"
    for host in slurm.hosts:
        assert "raylet" not in host.run(["ps", "-e", "-o", "comm"]).stdout

    assert slurm.submit(*arguments).wait(400) == 0, output_of(slurm, tmp_path)
    assert (run / "scores.json").exists()
    assert {path.name for path in run.glob("logs/train-answer-system-*.jsonl")} == {
        f"train-answer-system-node-{name}.jsonl" for name in "ab"
    }


def test_a_job_whose_ray_does_not_start_fails(slurm, tmp_path):
    slurm.hosts[0].start(
        [sys.executable, "-m", "http.server", "6379", "--bind", slurm.hosts[0].address], tmp_path / "in-the-way.log"
    )
    time.sleep(1)
    assert slurm.submit(*RUN).wait(200) == 1
    assert "Ray did not start on every node" in slurm.log.read_text()
