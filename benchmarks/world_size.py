"""A training at world sizes 2, 1, 2 compared with one that stays at 2, for every ZeRO stage.

    python benchmarks/world_size.py [LEARNING_RATE]

MiniSQA, a tiny model, fp32, 60 steps; ranks are killed with -9 after steps 21 and 41 and started again with
another world size, from the checkpoints of steps 20 and 40. Prints the largest relative difference of the loss
in the twenty steps after each change.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from launcher.runs.journal import JournalReader

SETTINGS = [
    "data.mini_sqa.num_train=640",
    "data.mini_sqa.num_val=16",
    "data.mini_sqa.num_test=16",
    "rationale.num_steps=60",
    "training.log_every=1",
    "training.validate_every=1",
    "training.checkpoint_every=20",
    "training.micro_batch_size=4",
    "training.warmup_steps=0",
]
RANK = Path(__file__).parents[1] / "tests" / "helpers" / "rank.py"


def losses(folder: Path, name: str) -> dict[int, float]:
    points = JournalReader(folder / "runs" / name / "logs" / "rationale-metrics.jsonl").read()
    return {point["step"]: point["metrics"]["loss"] for point in points if "loss" in point["metrics"]}


def main(learning_rate: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def prepare(run: str, stage: int) -> None:
            changes = [
                *SETTINGS,
                f"training.learning_rate={learning_rate}",
                f"training.zero_stage={stage}",
                f"run.name={run}",
            ]
            command = [
                sys.executable,
                "-m",
                "launcher",
                "train",
                "rationale",
                "--preset",
                "demo",
                "--write-job",
                f"{run}.json",
            ]
            subprocess.run(
                [*command, *(part for change in changes for part in ("--set", change))],
                cwd=folder,
                env=environment,
                check=True,
                capture_output=True,
            )

        def ranks(run: str, world_size: int, die_step: int | None = None) -> None:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(RANK)]
            command += ["--die", "0", str(die_step)] if die_step else []
            result = subprocess.run(
                [*command, f"{run}.json"], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert (result.returncode != 0) == (die_step is not None), result.stderr[-2000:]

        for stage in (0, 1, 2, 3):
            prepare(f"fixed-{stage}", stage)
            prepare(f"changing-{stage}", stage)
            ranks(f"fixed-{stage}", 2)
            for world_size, die_step in ((2, 21), (1, 41), (2, None)):
                ranks(f"changing-{stage}", world_size, die_step)
            fixed, changing = losses(folder, f"fixed-{stage}"), losses(folder, f"changing-{stage}")
            after = [
                max(abs(fixed[s] - changing[s]) / fixed[s] for s in range(first + 1, first + 21)) for first in (20, 40)
            ]
            print(
                f"ZeRO-{stage}: loss {fixed[1]:.3f} to {fixed[60]:.3f}; after 2 -> 1 {after[0]:.1e}, "
                f"after 1 -> 2 {after[1]:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "8e-5")
