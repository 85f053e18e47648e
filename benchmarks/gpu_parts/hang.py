"""The hang guard ends a rank whose GPU does not answer, and says where it waited."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from benchmarks.gpu_parts.machine import ON_GPU, ROOT, Proof

LIMIT_S, BUSY_S = 2.0, 20.0
LATEST_S = 3.0  # after the limit
SCRIPT = """
import sys, time, torch
from launcher.runs.hang_guard import HangGuard

def wait_for_the_device():
    if torch.cuda.is_available():
        torch.cuda._sleep(int({busy_s} * 1e9 * 2))  # cycles of at most 2 GHz
        torch.cuda.synchronize()
    else:
        time.sleep({busy_s})

if torch.cuda.is_available():
    torch.zeros(1, device="cuda")
print("ready", flush=True)
HangGuard({limit_s}).progress()
wait_for_the_device()
"""
AFTERWARDS = "import torch; torch.ones(4, device='cuda' if torch.cuda.is_available() else 'cpu').sum().item()"


def hang(proof: Proof) -> dict[str, Any]:
    """A process keeps the device busy for 20 s under a guard of 2 s."""
    script = SCRIPT.format(limit_s=LIMIT_S, busy_s=BUSY_S)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        started = time.perf_counter()
        _, errors = process.communicate(timeout=BUSY_S + 5)
        seconds = time.perf_counter() - started
    finally:
        process.kill()
    after = subprocess.run([sys.executable, "-c", AFTERWARDS], cwd=ROOT, capture_output=True, text=True)
    return {
        "status": process.returncode,
        "seconds": seconds,
        "stack": errors[-2000:],
        "headline": f"a guard of {LIMIT_S:g} s ended its process after {seconds:.1f} s",
        "checks": {
            "the process ends with status 1": process.returncode == 1,
            f"it ends within {LATEST_S:g} s of the limit": LIMIT_S <= seconds <= LIMIT_S + LATEST_S,
            "its stack names the line that waited": "wait_for_the_device" in errors,
            f"another process can use the {'GPU' if ON_GPU else 'CPU'} afterwards": after.returncode == 0,
        },
    }
