"""The programs beside ours as processes, each in its own environment (``peers/``), for rounds within one run.

    with open_peers(["ctranslate2"], model, sources, left_out) as engines:
        engines["CTranslate2, fp32, 32 rows"]()   # Written(ids=[[5, 8, 1], ...], seconds=8.2)

A program that cannot be made ready, or fails, is put into ``left_out`` with its reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from generation_rounds import Write, Written, leave_out
from peers.environments import PeerError, cache_folder, make, requirements

ROOT = Path(__file__).parents[1]
TITLES = {"ctranslate2": "CTranslate2", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def open_peers(
    names: Sequence[str], model: Path, sources: Sequence[Sequence[int]], max_new_tokens: int, left_out: dict[str, str]
) -> Iterator[dict[str, Write]]:
    """Start each program of ``names``; gives what writes all texts, by engine, and ends the programs afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "sources.json").write_text(
            json.dumps({"sources": [list(source) for source in sources], "max_new_tokens": max_new_tokens})
        )
        engines: dict[str, Write] = {}
        for name in names:
            try:
                peer = stack.enter_context(Peer(name, model, folder))
                engines |= {f"{TITLES.get(name, name)}, {each}": peer.engine(each) for each in peer.engines}
            except PeerError as error:
                leave_out(left_out, TITLES.get(name, name), error)
        yield engines


class Peer:
    """One program in its environment; the protocol is that of ``peers/protocol.py``.

    Raises:
        PeerError: its environment cannot be made, or it ended instead of an answer.
    """

    def __init__(self, name: str, model: Path, folder: Path) -> None:
        self._name, self._log = name, folder / f"{name}.log"
        python = make(name)
        converted = cache_folder() / "converted" / _key(model, name) / name
        command = [python, "-m", f"benchmarks.peers.{name}", model, converted, folder / "sources.json"]
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment | ONE_THREAD | OFFLINE,
                text=True,
            )
        self.engines: list[str] = []

    def __enter__(self) -> Peer:
        try:
            self.engines = self._answer()["engines"]
        except PeerError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            _stream(self._process.stdin).close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _stream(self._process.stdout).close()

    def engine(self, name: str) -> Write:
        """What writes all texts with one of its engines."""

        def write() -> Written:
            with contextlib.suppress(BrokenPipeError):  # then there is no answer
                print(name, file=self._process.stdin, flush=True)
            answer = self._answer()
            return Written(answer["ids"], answer["processor_seconds"])

        return write

    def _answer(self) -> dict:
        line = _stream(self._process.stdout).readline()
        if not line:
            status = self._process.wait()
            raise PeerError(f"its program ended with status {status}", self._log.read_text(errors="replace")[-2000:])
        return json.loads(line)


def _key(model: Path, name: str) -> str:
    """A name for what is made of a model by the packages of a requirement file."""
    content = (model / "model.safetensors").read_bytes() + json.dumps(requirements(name)).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # the process was started with pipes
    return stream
