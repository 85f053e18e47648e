"""A trial run of the large backbone: Flan-T5-large with ViT-sized features, ZeRO-3, two ranks, random weights.

    python benchmarks/large_backbone.py [--precision fp32] [--folder DIR] [--gpu]

Two optimizer steps and a checkpoint, a resume for a third step, the export, and the exported model read back
with from_pretrained: its loss on a batch must equal the one before. Prints parameters, seconds a step, sizes on
disk and the peak memory of the processes. With --gpu: bf16 and nccl, through the same torchrun start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from data_shards.writer import write_feature_shards
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.training.torchrun import read_job

SHAPE = (145, 1024)
SETTINGS = [
    "data.mini_sqa.num_train=16",
    "data.mini_sqa.num_val=2",
    "data.mini_sqa.num_test=2",
    "data.shards_dir=shards",
    "model.shape.d_model=1024",
    "model.shape.d_kv=64",
    "model.shape.d_ff=2816",
    "model.shape.num_layers=24",
    "model.shape.num_heads=16",
    "model.shape.feed_forward_proj=gated-gelu",
    "model.shape.tie_word_embeddings=false",
    "model.shape.vocab_size=32128",
    "training.zero_stage=3",
    "training.global_batch_size=2",
    "training.micro_batch_size=1",
    "training.checkpoint_every=2",
    "training.validate_every=1000",
    "training.log_every=1",
    "training.learning_rate=1e-5",
    # DeepSpeed's default buckets are made for GPUs: with them both ranks would hold the whole model and their shares.
    "training.deepspeed.zero_optimization.reduce_bucket_size=20_000_000",
    "training.deepspeed.zero_optimization.stage3_max_live_parameters=50_000_000",
    "training.deepspeed.zero_optimization.stage3_max_reuse_distance=0",
    "training.deepspeed.zero_optimization.stage3_prefetch_bucket_size=10_000_000",
    "training.deepspeed.zero_optimization.sub_group_size=50_000_000",
    "training.activation_checkpointing=true",
    "rationale.num_steps=3",
    "training.keep_checkpoints=1",
]


class PeakMemory:
    """Peak of the summed proportional memory of a process's children, sampled every half second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)


def torchrun(job: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Run two ranks; returns seconds and peak memory in GB."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "-m", "launcher.rank", str(job)]
    started = time.time()
    with PeakMemory() as peak:
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr[-4000:])
    return time.time() - started, peak.bytes / 1e9


def folder_size(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9


def reload_loss(job_path: Path) -> float:
    """Loss of the exported model on the probe batch, read back with from_pretrained."""
    import torch

    from launcher.training.loader import StageStream
    from mmcot.models.loss import count_target_tokens, token_loss_sum
    from mmcot.models.opening import open_model

    job = read_job(job_path)
    stream = StageStream(job, "train").open()
    block = stream.samples.load_block(stream.plan(0).batch_blocks(0)[0])
    model = open_model(RunDir(Path(job.run_dir)).model(job.stage)).eval()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    inputs = dict(block.tensors)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=model._shift_right(labels), use_cache=False).logits
    return token_loss_sum(logits, labels).item() / count_target_tokens(labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--folder", default=None)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    changes = [
        *SETTINGS,
        f"training.precision={options.precision}",
        f"cluster.use_gpu={str(options.gpu).lower()}",
        "data.features=vit",
    ]

    def mmcot(*arguments: str, without: str = "") -> None:
        overrides = [part for change in changes if not change.startswith(without or "-") for part in ("--set", change)]
        subprocess.run(
            [sys.executable, "-m", "launcher", *arguments, "--preset", "demo", *overrides],
            cwd=folder,
            env=environment,
            check=True,
            capture_output=True,
        )

    mmcot("data", "shard", without="data.features")
    random = np.random.default_rng(0)
    write_feature_shards(
        folder / "shards",
        name="vit",
        shape=SHAPE,
        features_of=lambda problem, counts: random.standard_normal(SHAPE if problem.images else (0, SHAPE[1])).astype(
            np.float16
        ),
    )
    mmcot("train", "rationale", "--write-job", "job.json")
    job_path = folder / "job.json"
    job = json.loads(job_path.read_text())
    job_path.write_text(json.dumps({**job, "num_steps": 2}))
    seconds, peak = torchrun(job_path, environment)
    run_dir = RunDir(Path(job["run_dir"]))
    print(
        f"two steps, checkpoint and export: {seconds:.0f} s, peak {peak:.1f} GB; "
        f"checkpoint {folder_size(run_dir.checkpoints('rationale')):.1f} GB on disk"
    )
    job_path.write_text(json.dumps({**job, "num_steps": 3}))
    seconds, peak = torchrun(job_path, environment)
    print(f"resume, a third step, checkpoint and export: {seconds:.0f} s, peak {peak:.1f} GB")
    points = [point for point in JournalReader(run_dir.journal("rationale")).read() if "loss" in point["metrics"]]
    for point in points:
        print(f"  step {point['step']}: loss {point['metrics']['loss']:.4f}, {point['metrics']['step_time_s']:.1f} s")
    manifest = json.loads((run_dir.checkpoints("rationale") / "step-000003" / "manifest.json").read_text())
    found = reload_loss(job_path)
    print(f"probe loss {manifest['probe_loss']:.6f} in training, {found:.6f} from the exported model")


if __name__ == "__main__":
    main()
