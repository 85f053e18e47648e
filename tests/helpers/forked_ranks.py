"""Ranks of a training, forked from a process with torch and DeepSpeed imported: a start takes a tenth of torchrun's.

    with ForkedRanks() as ranks:
        result = ranks.run([Path("job.json")], world_size=2)     # result.returncode, result.stderr

Like torchrun it ends all ranks when one of them fails, and returns 1. What torchrun itself does with signals is tested
with torchrun. Run as a script this file is the process that forks: it reads a request a line and answers with a status
a line.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What the ranks of a request ended with."""

    returncode: int
    stderr: str


class ForkedRanks:
    """The process that forks, for the length of a with block."""

    def __enter__(self):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHDYNAMO_DISABLE": "1",
            "DS_ACCELERATOR": "cpu",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait(60)

    def run_jobs(self, *jobs, world_size=2, die=()):
        """Write each training's job into its folder, and run all of them in the same ranks."""
        from data_shards.atomic_files import commit_json

        paths = [Path(job.run_dir) / "job.json" for job in jobs]
        for path, job in zip(paths, jobs, strict=True):
            commit_json(path, job.to_json())
        return self.run(paths, world_size=world_size, die=die)

    def run(self, paths, *, world_size, die=()):
        """Run jobs one after the other in the same ranks; ``die`` as in ``rank.py``."""
        with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
            arguments = ["--die", *map(str, die)] if die else []
            request = {"arguments": [*arguments, *map(str, paths)], "world_size": world_size, "log": log.name}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return Result(int(self.process.stdout.readline()), Path(log.name).read_text(errors="replace"))


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for_all(pids: list[int]) -> int:
    """0 once all ended well; after the first failure the others get SIGTERM, then SIGKILL, and 1 is returned."""
    failed_at = None
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            pids.remove(pid)
            if status and failed_at is None:
                failed_at = time.monotonic()
                send(pids, signal.SIGTERM)
        else:
            time.sleep(0.01)
            if failed_at is not None and time.monotonic() > failed_at + 20:
                send(pids, signal.SIGKILL)
    return int(failed_at is not None)


def send(pids: list[int], number: int) -> None:
    """Send a signal to all of them."""
    for pid in pids:
        os.kill(pid, number)


def be_rank(number: int, request: dict, port: int) -> None:
    """What a forked process does instead of waiting for requests."""
    import rank

    os.setpgid(0, 0)
    descriptor = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(request["world_size"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv[1:] = request["arguments"]
    rank.main()


def serve() -> None:
    """Answer requests until standard input is closed."""
    sys.modules.setdefault("mlflow", None)  # DeepSpeed imports it if it can
    import rank  # noqa: F401, with torch, transformers and DeepSpeed

    for line in sys.stdin:
        request, port, pids = json.loads(line), free_port(), []
        for number in range(request["world_size"]):
            pid = os.fork()
            if pid == 0:
                be_rank(number, request, port)
                return
            pids.append(pid)
        print(wait_for_all(pids), flush=True)


if __name__ == "__main__":
    serve()
