"""A rank of the proof's trainings: ``launcher.rank`` for several jobs, one after the other, in one process.

    torchrun --nproc-per-node 1 benchmarks/gpu_parts/rank.py JOB.json [JOB.json ...]

It ends with the first status that is not 0. Attention is computed by matrix products and torch uses deterministic
operations where it has them, so that a resume can be bit-equal. With MMCOT_NOT_JUDGED=1, for a device whose values
mean nothing, losses are not checked.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
sys.path.insert(0, str(Path(__file__).parents[2]))


def compute_deterministically() -> None:
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)


def main() -> int:
    import torch

    from benchmarks.gpu_parts.unjudged import check_no_values
    from launcher.training.torchrun import main as run_job

    sys.modules.setdefault("mlflow", None)  # pyright: ignore[reportArgumentType], DeepSpeed imports it if it can
    compute_deterministically()
    if os.environ.get("MMCOT_NOT_JUDGED"):
        check_no_values()
    for path in sys.argv[1:]:
        status = run_job([path])
        if status:
            return status
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    status = 1
    try:
        status = main()
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # NCCL's own end may wait for a rank that is gone
