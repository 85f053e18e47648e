"""The product's training under torchrun: ZeRO 1, 2 and 3 in fp32 and bf16, a resume, and SIGTERM."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.gpu_parts.jobs import STAGE, make_job, prepare, small_settings, written
from benchmarks.gpu_parts.machine import ON_GPU, ROOT, Proof
from launcher.runs.checkpoint_names import checkpoints_by_step
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.runs.signals import STOPPED
from launcher.stages.jobs import TrainJob

STEPS = 6
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative, of losses of other ZeRO stages
RANK = ROOT / "benchmarks" / "gpu_parts" / "rank.py"
MANY = 10_000  # steps of a training that is to be stopped


class RankError(RuntimeError):
    """Ranks ended with a status that was not expected; the message has the end of their output."""


def zero(proof: Proof) -> dict[str, Any]:
    """Losses of every stage and precision, weights after a resume, and the status after SIGTERM."""
    folder = proof.folder.absolute() / "zero"
    shutil.rmtree(folder, ignore_errors=True)
    settings = small_settings(folder)
    lengths = prepare(settings, folder / "lengths")
    jobs = {
        f"{precision}, ZeRO-{stage}": make_job(
            settings, lengths, folder / f"{precision}-{stage}", num_steps=STEPS, zero_stage=stage, precision=precision
        )
        for precision in ("fp32", "bf16")
        for stage in (1, 2, 3)
    }
    # A rate that does not depend on the number of steps, so that a part of them is a part of the training.
    constant = {"schedule": "constant", "checkpoint_every": STEPS // 2}
    whole = make_job(settings, lengths, folder / "undisturbed", num_steps=STEPS, **constant)
    half = make_job(settings, lengths, folder / "resumed", num_steps=STEPS // 2, **constant)
    result: dict[str, Any] = {"world_size": world_size(), "backend": "nccl" if ON_GPU else "gloo"}
    started = time.perf_counter()
    everything = [*jobs.values(), whole, half]
    for together in [everything] if proof.judged else [[job] for job in everything]:
        torchrun(proof, *together)
    losses = {name: losses_of(job) for name, job in jobs.items()}
    result |= {"losses": losses, "checks": checks_of_stages(losses), "seconds_stages": since(started)}
    proof.keep(result)
    started = time.perf_counter()
    torchrun(proof, written(half, num_steps=STEPS))
    difference = largest_difference(weights_of(half), weights_of(whole))
    result |= {"resume_largest_difference": difference, "seconds_resume": since(started)}
    result["checks"]["a resumed training is bit-equal"] = difference == 0.0
    result["checks"]["it has trained each step once"] = len(losses_of(half)) == STEPS
    proof.keep(result)
    result |= stop(proof, make_job(settings, lengths, folder / "stopped", num_steps=MANY, checkpoint_every=MANY))
    result["checks"] |= {
        f"SIGTERM ends a rank with status {STOPPED}": result["stop_status"] == STOPPED,
        "SIGTERM leaves a checkpoint": bool(result["stop_checkpoints"]),
    }
    result["headline"] = (
        f"{result['world_size']} rank(s), {result['backend']}: ZeRO-1 and 3 differ by "
        f"{max(map(difference_of, losses['fp32, ZeRO-1'], losses['fp32, ZeRO-3'])):.1e}, a resume by {difference:.1e}, "
        f"SIGTERM: status {result['stop_status']} after {result['stop_seconds']} s"
    )
    return result


def checks_of_stages(losses: dict[str, list[float]]) -> dict[str, bool]:
    checks = {}
    for name, found in losses.items():
        precision = name[:4]
        expected = losses[f"{precision}, ZeRO-1"]
        checks[f"{name}: losses of all steps as with ZeRO-1"] = is_close(found, expected, TOLERANCE[precision])
        checks[f"{name}: the loss falls"] = len(found) == STEPS and found[-1] < found[0]
    return checks


def world_size() -> int:
    """A rank for each GPU, four at most; two on a CPU."""
    return min(4, torch.cuda.device_count()) if ON_GPU else 2


def torchrun(proof: Proof, *jobs: TrainJob) -> None:
    """Run jobs one after the other in the same ranks.

    Raises:
        RankError: they did not end with status 0.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size())]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(RANK)]
    result = subprocess.run(
        [*command, *(str(Path(job.run_dir) / "job.json") for job in jobs)],
        env=environment(proof),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RankError(f"torchrun ended with status {result.returncode}:\n{(result.stdout + result.stderr)[-6000:]}")


def environment(proof: Proof) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, **({} if proof.judged else {"MMCOT_NOT_JUDGED": "1"})}


def losses_of(job: TrainJob) -> list[float]:
    points = JournalReader(RunDir(Path(job.run_dir)).journal(STAGE)).read()
    return [point["metrics"]["loss"] for point in points if "loss" in point["metrics"]]


def weights_of(job: TrainJob) -> dict[str, torch.Tensor]:
    return load_file(RunDir(Path(job.run_dir)).model(STAGE) / "model.safetensors")


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def difference_of(a: float, b: float) -> float:
    return abs(a - b)


def stop(proof: Proof, job: TrainJob) -> dict[str, Any]:
    """Start one rank without torchrun, as srun does, and send it SIGTERM after its second step."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    log = Path(job.run_dir) / "rank.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(RANK), str(Path(job.run_dir) / "job.json")],
            env=environment(proof) | ranks,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 60
            while len(losses_of(job)) < 2 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            sent = time.perf_counter()
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        finally:
            process.kill()
    if status != STOPPED:
        print(log.read_text(errors="replace")[-3000:])
    return {
        "stop_status": status,
        "stop_seconds": since(sent),
        "stop_checkpoints": [path.name for path in checkpoints_by_step(RunDir(Path(job.run_dir)).checkpoints(STAGE))],
    }


def is_close(found: list[float], expected: list[float], tolerance: float) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(abs(a - b) <= tolerance * abs(b) for a, b in pairs)


def since(started: float) -> float:
    return round(time.perf_counter() - started, 1)
