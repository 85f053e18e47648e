"""Every block of the pages that a reader would type runs, or says why it cannot.

``make test`` reads them; ``make test-docs`` runs them, each page in its own folder, as a reader would who follows it
from the top. With MMCOT_DOCS_FOLDER that folder is kept and used again, so that existing files are not made again.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from docs_blocks import (
    EXCUSES,
    PYTHON,
    ROOT,
    Block,
    PageError,
    count,
    read_blocks,
    read_pages,
    script_of,
)
from docs_samples import PREPARATIONS
from PIL import Image

AT_LEAST = 15  # blocks that are run; more may be, never fewer
TIMEOUT_S = 1500.0  # for one block; the demo takes the longest
NOT_OURS = (
    "MAKE",
    "MFLAGS",
    "MLFLOW_",
    "RAY_",
    "AWS_",
    "HF_",
    "MMCOT_",
    "VIRTUAL_ENV",
    "PYTEST_",
)  # of the shell that the tests are started in


def page(*lines):
    return read_blocks("page.md", "\n".join(lines))


def test_every_block_of_the_pages_runs_is_excused_or_is_output():
    pages = read_pages()
    for block in (block for blocks in pages.values() for block in blocks if block.runs):
        script_of(block)
        for told in block.told("before"):
            assert told.split()[0] in PREPARATIONS, (
                f"{block.where}: no preparation {told.split()[0]!r} in docs_samples.py"
            )
    number, excused = count(pages)
    assert number >= AT_LEAST, f"{number} blocks are run, {AT_LEAST} were; the rest is excused: {excused}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["```", "mmcot run", "```"], "page.md:1: a block in no language"),
        (["", "```cmd", "mmcot run", "```"], "page.md:2: a block in cmd"),
        (["```bash", "mmcot run"], "never closed"),
        (
            ["<!-- not run: it is slow: very -->", "```bash", "mmcot run", "```"],
            "give one of cluster, GPU, cloud, download",
        ),
        (["<!-- not run: GPU -->", "```bash", "mmcot run", "```"], "why this block needs it"),
        (["<!-- not run: GPU: bf16 -->", "", "```bash", "mmcot run", "```"], "stands above no fence"),
        (["<!-- not run: GPU: bf16 -->"], "stands above no fence"),
        (["<!-- not run: GPU: bf16 -->", "```text", "done", "```"], "a block of text is not run"),
        (["<!-- smaller: mmcot run: --help -->", "```python", "print()", "```"], "for commands of a shell"),
    ],
)
def test_a_block_that_would_neither_run_nor_be_excused_is_refused(lines, message):
    with pytest.raises(PageError, match=message):
        page(*lines)


def test_blocks_are_found_in_lists_with_other_fences_and_with_fences_within():
    blocks = page("- one", "  ```bash", "  echo a", "  ```", "~~~~text", "```bash", "~~~~", "````bash", "```", "````")
    assert [(block.language, block.text, block.line) for block in blocks] == [
        ("bash", "echo a\n", 2),
        ("text", "```bash\n", 5),
        ("bash", "```\n", 8),
    ]


def test_what_is_excused_is_counted_by_its_kind():
    blocks = page(
        "<!-- not run: GPU: bf16 -->",
        "```bash",
        "a",
        "```",
        "```sh",
        "b",
        "```",
        "```python",
        "c",
        "```",
        "```json",
        "{}",
        "```",
    )
    assert count({"page.md": blocks}) == (2, {"cluster": 0, "GPU": 1, "cloud": 0, "download": 0})


def test_a_command_is_made_smaller_before_its_comment_and_its_next_line():
    (block,) = page(
        "<!-- smaller: mmcot run: --set a.b=1 -->",
        "<!-- smaller: mmcot run --config: --set c.d=2 -->",
        "```bash",
        "mmcot run \\",
        "    --preset demo   # a comment",
        "mmcot run --config x.yaml",
        "mmcot runs",
        "```",
    )
    assert script_of(block).splitlines()[1:] == [
        "mmcot run --set a.b=1 \\",
        "    --preset demo   # a comment",
        "mmcot run --config --set c.d=2 x.yaml",
        "mmcot runs",
    ]


def test_a_size_stands_for_its_settings():
    (block,) = page("<!-- smaller: mmcot run: short --set a.b=1 -->", "```bash", "mmcot run", "```")
    (line,) = script_of(block).splitlines()[1:]
    assert line.startswith("mmcot run --set cluster.num_workers=1 --set ") and line.endswith(" --set a.b=1")


def test_a_comment_about_a_command_that_is_not_there_is_refused():
    (block,) = page("<!-- smaller: mmcot run: --set a.b=1 -->", "```bash", "mmcot tune", "```")
    with pytest.raises(PageError, match="expected the beginning of a command of this block"):
        script_of(block)


def test_of_a_console_what_follows_the_prompt_is_run():
    (block,) = page("```console", "$ echo a \\", ">   b", "a b", "```")
    assert script_of(block).splitlines()[1:] == ["echo a \\", "  b"]


def test_a_command_in_the_middle_of_a_block_may_not_fail(tmp_path):
    (block,) = page("```bash", "false", "echo well", "```")
    status, output, _ = run_block(block, tmp_path, dict(os.environ))
    assert status == 1 and "well" not in output


def test_a_server_is_ended_as_soon_as_it_answers(tmp_path):
    (block,) = page(
        "<!-- until: python -m http.server: http://127.0.0.1:8799 -->",
        "```bash",
        "python -m http.server --bind 127.0.0.1 8799",
        "echo after",
        "```",
    )
    with_python = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    status, output, seconds = run_block(block, tmp_path, with_python)
    assert status == 0 and output.endswith("after\n") and seconds < 60, output


def test_the_readme_is_read_in_a_few_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


def test_the_magnets_of_the_readme_are_a_picture_of_the_demo():
    from data_shards.mini_sqa.paint import paint_magnets

    tiles = paint_magnets(random.Random(5), ("south", "north"))
    picture = np.asarray(Image.open(ROOT / "docs" / "images" / "magnets.png"))
    assert np.array_equal(picture, tiles.repeat(8, axis=0).repeat(8, axis=1))


@pytest.mark.docs
def test_every_block_runs(tmp_path):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a block's processes are ended with these
    failures, pages = [], read_pages()
    for name, blocks in pages.items():
        kept = os.environ.get("MMCOT_DOCS_FOLDER")
        folder = (Path(kept) if kept else tmp_path) / name.replace("/", "-").removesuffix(".md")
        if any(block.runs for block in blocks):
            failures += run_page(blocks, folder)
    number, excused = count(pages)
    reasons = "; ".join(f"{EXCUSES[kind]}: {times}" for kind, times in excused.items())
    print(
        f"\n{number} blocks run (at least {AT_LEAST}), {len(failures)} of them failed; "
        f"{sum(excused.values())} excused: {reasons}"
    )
    assert not failures, "\n\n".join(failures)


def run_page(blocks: list[Block], folder: Path) -> list[str]:
    """Run the blocks of a page in their order; returns what failed."""
    failures: list[str] = []
    environment = open_folder(folder)
    with contextlib.ExitStack() as resources:
        for block in blocks:
            if block.file is not None and not block.excuse:
                (folder / block.file).write_text(block.text, encoding="utf-8")
            if not block.runs:
                continue
            for told in block.told("before"):
                name, *arguments = shlex.split(told)
                environment |= resources.enter_context(PREPARATIONS[name](folder, arguments))
            status, output, seconds = run_block(block, folder, environment)
            print(
                f"\n{block.where}: {'ok' if status == 0 else f'FAILED with {status}'}, {seconds:.0f} s",
                end="",
                flush=True,
            )
            if status != 0:
                failures.append(
                    f"{block.where} ended with {status}:\n{script_of(block)}\nits last lines:\n{output[-4000:]}"
                )
    return failures


def open_folder(folder: Path) -> dict[str, str]:
    """A folder like a checkout after `make`, but for the code; returns the environment that a reader has there."""
    bin = folder / ".venv" / "bin"
    (folder / "home").mkdir(parents=True, exist_ok=True)
    bin.parent.mkdir(exist_ok=True)
    installed = {
        "bin": Path(sys.executable).parent,
        "lib": Path(sys.prefix) / "lib",
        "pyvenv.cfg": Path(sys.prefix) / "pyvenv.cfg",
    }
    links = {bin.parent / name: path for name, path in installed.items()} | {
        folder / name: ROOT / name for name in ("Makefile", "pyproject.toml", "docs", "deploy")
    }
    for link, target in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    (bin.parent / ".installed").touch()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}
    return inherited | {"PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}


def run_block(block: Block, folder: Path, environment: dict[str, str]) -> tuple[int, str, float]:
    """Run a block in a folder; returns its status, what it printed and its seconds."""
    script, log = folder / ".block", folder / ".block.log"
    script.write_text(script_of(block), encoding="utf-8")
    command = ["python" if block.language in PYTHON else "bash", str(script)]
    begun = time.monotonic()
    with (
        open(log, "wb") as output,
        _process(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            status = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            status = 124
    return status, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - begun


@contextlib.contextmanager
def _process(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A process in a group of its own, of which nothing is left at the end."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
