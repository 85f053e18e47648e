"""Seeded faults in one training, for each ZeRO stage: does it end with the weights of an undisturbed one?

    python benchmarks/faults.py [--faults 20] [--stages 1 2 3] [--seed 0] [--steps 400]

A Ray cluster of a head and two nodes of one processor each on this machine, two workers. At random steps a
worker is killed with -9 or stopped with SIGSTOP, a node is killed with -9 and replaced, the driver is killed
with -9 or ended with SIGTERM and started again. Prints every fault with the seconds to the next step
that counts, whether the weights are bit-equal, the ledger's proof, and the goodput.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir

SETTINGS = [
    "data.mini_sqa.num_train=640",
    "data.mini_sqa.num_val=16",
    "data.mini_sqa.num_test=16",
    "training.log_every=1",
    "training.validate_every=100000",
    "training.checkpoint_every=10",
    "training.ledger=true",
    "training.max_failures=1000",
    "training.hang_timeout_s=10",
    "training.micro_batch_size=4",
]
KINDS = ("worker -9", "worker SIGSTOP", "node -9", "driver -9", "driver SIGTERM")


class Training:
    """The command under test and the files of its folder."""

    def __init__(self, folder: Path, name: str, overrides: list[str], address: str) -> None:
        self.run_dir = RunDir(folder / "runs" / name)
        changes = [*SETTINGS, *overrides, f"run.name={name}", f"cluster.address={address}"]
        self._command = [sys.executable, "-m", "launcher", "train", "rationale", "--preset", "demo"]
        self._command += [part for change in changes for part in ("--set", change)]
        self._folder, self._log = folder, folder / f"{name}.log"
        self.driver: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the driver; its output is appended to the training's log."""
        with open(self._log, "a") as log:
            self.driver = subprocess.Popen(self._command, cwd=self._folder, stdout=log, stderr=log)

    def last_step(self) -> tuple[int, float]:
        """The last logged step and when it was logged."""
        points = [p for p in JournalReader(self.run_dir.journal("rationale")).read() if "loss" in p["metrics"]]
        return (points[-1]["step"], points[-1]["time_ms"] / 1000) if points else (0, 0.0)

    def worker_pid(self, rank: int) -> int:
        """The process id of a rank, from its log."""
        text = (self.run_dir.logs / f"rationale-rank{rank}.log").read_text()
        return int(text.rpartition("process ")[2].split()[0])

    def starts(self) -> int:
        """How often rank 0 was ready to continue."""
        log = self.run_dir.logs / "rationale-rank0.log"
        return log.read_text().count("ready to continue") if log.exists() else 0

    def weights(self) -> str:
        """The sha256 of the exported weights."""
        return hashlib.sha256((self.run_dir.model("rationale") / "model.safetensors").read_bytes()).hexdigest()

    def is_done(self) -> bool:
        """Whether the training has committed its marker."""
        return self.run_dir.marker("train-rationale") is not None


def cause(kind: str, training: Training, cluster, chance: random.Random) -> None:
    if kind.startswith("worker"):
        pid = training.worker_pid(chance.randrange(2))
        try:
            os.kill(pid, signal.SIGKILL if kind == "worker -9" else signal.SIGSTOP)
        except ProcessLookupError:
            print(f"    worker {pid} had already ended", flush=True)
    elif kind == "node -9":
        node = chance.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
        node.kill_raylet()
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
    else:
        training.driver.send_signal(signal.SIGKILL if kind == "driver -9" else signal.SIGTERM)
        training.driver.wait()
        training.start()


def run(training: Training, faults: list[tuple[int, str]], cluster, chance: random.Random) -> None:
    """Run to the end, causing each fault when its step is reached."""
    training.start()
    for at_step, kind in faults:
        while training.last_step()[0] < at_step and not training.is_done():
            if training.driver.poll() not in (None, 0):
                raise SystemExit(f"the driver ended with {training.driver.returncode}; see its log")
            time.sleep(0.05)
        step, starts = training.last_step()[0], training.starts()
        caused = time.time()
        cause(kind, training, cluster, chance)
        while training.starts() == starts or (now := training.last_step())[0] <= step or now[1] < caused:
            if training.driver.poll() not in (None, 0):
                raise SystemExit(f"the driver ended with {training.driver.returncode}; see its log")
            time.sleep(0.05)
        print(f"  step {step:>4}  {kind:<15} {time.time() - caused:5.1f} s until step {now[0]}", flush=True)
    if training.driver.wait():
        raise SystemExit(f"the driver ended with {training.driver.returncode}; see its log")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--folder", default=None)
    options = parser.parse_args()
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    try:
        for stage in options.stages:
            chance = random.Random(f"{options.seed}-{stage}")
            common = [f"training.zero_stage={stage}", f"rationale.num_steps={options.steps}"]
            calm, disturbed = (
                Training(folder, f"{name}-{stage}", common, cluster.address) for name in ("calm", "disturbed")
            )
            run(calm, [], cluster, chance)
            steps = sorted(chance.sample(range(11, options.steps - 10), options.faults))
            print(f"ZeRO-{stage}: {options.faults} faults in {options.steps} steps, checkpoints every 10", flush=True)
            run(disturbed, [(step, chance.choice(KINDS)) for step in steps], cluster, chance)
            ledger = subprocess.run(
                [sys.executable, "-m", "launcher", "data", "ledger", str(disturbed.run_dir.path)],
                capture_output=True,
                text=True,
            )
            proof = ledger.stdout.strip().splitlines()
            print(
                f"  weights bit-equal: {calm.weights() == disturbed.weights()};  ledger: "
                f"{ledger.returncode == 0}, {proof[0] if proof else ledger.stderr}",
                flush=True,
            )
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
