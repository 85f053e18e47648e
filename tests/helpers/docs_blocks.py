"""The fenced blocks of the pages, and how each one is run.

A block in a language that a reader would type runs as it stands; a block of output is marked ``text``, ``json`` or
``yaml``. Comments directly above a fence, which no reader sees, say what else there is to know:

    <!-- not run: GPU: the preset trains in bf16 -->           excused: a kind of EXCUSES and why
    <!-- file: lr.yaml -->                                      the block is the content of a file that a later one
                                                                reads
    <!-- before: pictures a1.png -->                            a preparation of docs_samples.py with its arguments
    <!-- smaller: mmcot run: tiny --set run.seed=1 -->          commands that start so get these arguments too; a name
                                                                of SIZES is replaced by its arguments
    <!-- until: mmcot mlflow up: http://127.0.0.1:5000 -->      Ctrl-C for a command that serves, once the address
                                                                answers
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/**/*.md", "deploy/**/*.md")
SHELL, PYTHON, PROMPTED = ("bash", "sh", "shell"), ("python",), ("console",)
TYPED = SHELL + PYTHON + PROMPTED
SHOWN = ("text", "json", "yaml")
EXCUSES = {
    "cluster": "needs a cluster",
    "GPU": "needs a GPU",
    "cloud": "needs a cloud, or accounts",
    "download": "needs downloaded data or models",
}
WAIT = shlex.quote(str(ROOT / "tests" / "helpers" / "docs_until.py"))
_SHORT = (
    "cluster.num_workers=1",
    "rationale.num_steps=20",
    "answer.num_steps=4",
    "training.validate_every=10",
    "rationale.max_target_tokens=24",
)
_TINY = (*_SHORT, "data.mini_sqa.num_train=64", "data.mini_sqa.num_val=16", "data.mini_sqa.num_test=16")
SIZES = {
    name: " ".join(f"--set {value}" for value in values) for name, values in (("short", _SHORT), ("tiny", _TINY))
}  # of a run; and of its MiniSQA
_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^\s`]*)")
_COMMENT = re.compile(r"^\s*<!--\s*(.*?)\s*-->\s*$")
_DIRECTIVE = re.compile(r"^(not run|file|before|smaller|until):\s*(.*)$")


class PageError(ValueError):
    """A block that would neither run nor is excused; the message names page and line."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block; ``line`` is its fence's, ``notes`` the comments above it as (kind, text)."""

    page: str
    line: int
    language: str
    text: str
    notes: tuple[tuple[str, str], ...] = ()

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def told(self, kind: str) -> list[str]:
        return [text for name, text in self.notes if name == kind]

    @property
    def excuse(self) -> str | None:
        """The kind of excuse, or None where the block is run or shown."""
        told = self.told("not run")
        return told[0].partition(":")[0].strip() if told else None

    @property
    def file(self) -> str | None:
        """The name of the file that the block is the content of."""
        told = self.told("file")
        return told[0] if told else None

    @property
    def runs(self) -> bool:
        return self.language in TYPED and self.excuse is None


def read_pages(root: Path = ROOT) -> dict[str, list[Block]]:
    """The blocks of every page that has any."""
    paths = [path for pattern in PAGES for path in sorted(root.glob(pattern))]
    pages = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in paths}
    return {name: blocks for name, text in pages.items() if (blocks := read_blocks(name, text))}


def read_blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in order.

    Raises:
        PageError: a fence is not closed, its language is not known, or a comment above it is not an allowed one.
    """
    blocks: list[Block] = []
    lines, number, notes = text.splitlines(), 0, []
    while number < len(lines):
        comment, fence = _COMMENT.match(lines[number]), _FENCE.match(lines[number])
        if fence is None:
            directive = _DIRECTIVE.match(comment[1]) if comment else None
            if notes and directive is None:
                raise PageError(
                    f"{page}:{number}: the comment {notes[-1]} stands above no fence; "
                    "put it directly above the block it is about"
                )
            notes += [directive.groups()] if directive else []
            number += 1
            continue
        indent, marks, language = fence.groups()
        closing = re.compile(rf"^\s*{re.escape(marks[0])}{{{len(marks)},}}\s*$")
        end = next((place for place in range(number + 1, len(lines)) if closing.match(lines[place])), None)
        if end is None:
            raise PageError(f"{page}:{number + 1}: the fence is never closed")
        content = "".join(line.removeprefix(indent) + "\n" for line in lines[number + 1 : end])
        blocks.append(_checked(Block(page, number + 1, language, content, tuple(notes))))
        number, notes = end + 1, []
    if notes:
        raise PageError(
            f"{page}:{number}: the comment {notes[-1]} stands above no fence; "
            "put it directly above the block it is about"
        )
    return blocks


def _checked(block: Block) -> Block:
    if block.language not in TYPED + SHOWN:
        raise PageError(
            f"{block.where}: a block in {block.language or 'no language'}; "
            f"mark what a reader types as one of {', '.join(TYPED)} and "
            f"what is only shown as one of {', '.join(SHOWN)}"
        )
    for told in block.told("not run"):
        kind, _, why = told.partition(":")
        if kind not in EXCUSES or not why.strip():
            raise PageError(
                f"{block.where}: 'not run: {told}'; give one of {', '.join(EXCUSES)}, "
                "a colon and why this block needs it"
            )
    if block.language in SHOWN and any(kind != "file" for kind, _ in block.notes):
        raise PageError(f"{block.where}: a block of {block.language} is not run, so only 'file:' may stand above it")
    if block.excuse and len(block.notes) > 1:
        raise PageError(
            f"{block.where}: it is excused, so nothing else is to be known of how it runs; take the other comments away"
        )
    for kind in ("smaller", "until"):
        if block.told(kind) and block.language not in SHELL + PROMPTED:
            raise PageError(f"{block.where}: '{kind}' is for commands of a shell")
    return block


def script_of(block: Block) -> str:
    """What is run: a Python block as it stands; a shell's stops at the first command that fails.

    Raises:
        PageError: a comment above the block is about a command that is not in it.
    """
    if block.language in PYTHON:
        return block.text
    lines = _commands(block)
    for kind in ("smaller", "until"):
        done: set[int] = set()
        for told in sorted(block.told(kind), key=len, reverse=True):  # of two beginnings the longer one says more
            begins, _, more = (part.strip() for part in told.partition(": "))
            found = [number for number, line in enumerate(lines) if re.match(rf"\s*{re.escape(begins)}(\s|$)", line)]
            if not begins or not more or not found:
                raise PageError(
                    f"{block.where}: '{kind}: {told}'; expected the beginning of a command of this block, "
                    "a colon and what is added"
                )
            more = " ".join(SIZES.get(word, word) for word in more.split(" "))
            for number in set(found) - done:
                lines[number] = (
                    f"python {WAIT} {more} {lines[number].lstrip()}"
                    if kind == "until"
                    else _insert(lines[number], begins, more)
                )
            done.update(found)
    return "set -euo pipefail\n" + "\n".join(lines) + "\n"


def _commands(block: Block) -> list[str]:
    """The lines of a shell's block; of a prompted one those after the prompt, because the others are its output."""
    lines = block.text.splitlines()
    if block.language not in PROMPTED:
        return lines
    typed = [line[2:] for line in lines if line.startswith(("$ ", "> "))]
    if not typed:
        raise PageError(f"{block.where}: a console block without a line that begins with '$ '; mark output as text")
    return typed


def _insert(line: str, begins: str, more: str) -> str:
    """Insert arguments directly after the beginning, before any comment and the command's next line."""
    start = line.index(begins) + len(begins)
    return f"{line[:start]} {more}{line[start:]}"


def count(pages: dict[str, Sequence[Block]]) -> tuple[int, dict[str, int]]:
    """How many blocks are run, and how many are excused by kind."""
    blocks = [block for page in pages.values() for block in page]
    excused = {kind: sum(block.excuse == kind for block in blocks) for kind in EXCUSES}
    return sum(block.runs for block in blocks), excused
