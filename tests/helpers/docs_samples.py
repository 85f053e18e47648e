"""What the pages' commands are run on where a reader has things of their own: pictures, tars, an object store."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

NUM_QUESTIONS = {"train-000000": 12, "train-000001": 12, "val": 4, "test": 4}


@contextlib.contextmanager
def pictures(folder: Path, names: Sequence[str]) -> Iterator[dict[str, str]]:
    """A picture of each name."""
    for number, name in enumerate(names):
        _picture(number).save(folder / name)
    yield {}


@contextlib.contextmanager
def demo(folder: Path, arguments: Sequence[str]) -> Iterator[dict[str, str]]:
    """A finished demo of a tiny size in runs/demo."""
    sizes = (
        "cluster.num_workers=1",
        "rationale.num_steps=20",
        "answer.num_steps=4",
        "training.validate_every=10",
        "rationale.max_target_tokens=24",
        "data.mini_sqa.num_train=64",
        "data.mini_sqa.num_val=16",
        "data.mini_sqa.num_test=16",
    )
    command = [sys.executable, "-m", "launcher", "run", "--preset", "demo"]
    command += [part for size in sizes for part in ("--set", size)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    yield {}


@contextlib.contextmanager
def tars(folder: Path, arguments: Sequence[str]) -> Iterator[dict[str, str]]:
    """Webdataset tars of a person's own: tars/train-000000.tar, tars/train-000001.tar, tars/val.tar, tars/test.tar."""
    (folder / "tars").mkdir(exist_ok=True)
    for name, number in NUM_QUESTIONS.items():
        with tarfile.open(folder / "tars" / f"{name}.tar", "w") as tar:
            for place in range(number):
                row = {
                    "question": f"Is {place} in {name} odd?",
                    "choices": ["yes", "no"],
                    "answer": 1 - place % 2,
                    "hint": "",
                    "image": "image.png",
                    "solution": "Count.",
                }
                stream = io.BytesIO()
                _picture(place).save(stream, "PNG")
                for extension, data in (("json", json.dumps(row).encode()), ("png", stream.getvalue())):
                    member = tarfile.TarInfo(f"{name}-{place}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    yield {}


@contextlib.contextmanager
def s3(folder: Path, uploads: Sequence[str]) -> Iterator[dict[str, str]]:
    """Start an S3 server with ``bucket``; each upload, FOLDER=NAME, is a folder stored in it under a name."""
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        filesystem = s3fs.S3FileSystem(key="testing", secret="testing", endpoint_url=address)
        filesystem.mkdir("bucket")
        for upload in uploads:
            source, _, name = upload.partition("=")
            filesystem.put(f"{folder / source}/", f"bucket/{name}/", recursive=True)
        yield {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_ENDPOINT_URL": address,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


PREPARATIONS: dict[str, Callable[[Path, Sequence[str]], contextlib.AbstractContextManager[dict[str, str]]]] = {
    "demo": demo,
    "pictures": pictures,
    "tars": tars,
    "s3": s3,
}


def _picture(number: int) -> Image.Image:
    return Image.new("RGB", (48, 64), (40 * number % 256, 90, 200 - 10 * number % 200))
