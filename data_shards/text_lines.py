"""The lines of a file of generated texts; their form is described in ``data_shards/generated_texts.py``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_shards.errors import ShardError
from data_shards.json_shapes import Shape, Whole, parse_record
from data_shards.strict_json import read_text
from mmcot.errors import InputError

KEYS_OF_TEXTS = {"qid": str, "candidates?": [{"candidate": Whole()}]}  # what ``texts_of`` reads


def read_lines(path: str | Path, shape: Shape = dict) -> list[dict[str, Any]]:
    """Read a committed file.

    Args:
        shape: of a line, as for ``read_record``.

    Raises:
        ShardError: a line is not valid JSON, or has another shape.
    """
    remedy = "restore it, or delete the file and run again"
    try:
        # Not splitlines(): a model may generate U+2028, which does not end a line in JSONL.
        lines = enumerate(read_text(path).split("\n"), start=1)
        return [parse_record(line, shape, file=path, line=number, remedy=remedy) for number, line in lines if line]
    except InputError as error:
        raise ShardError(str(error) if remedy in str(error) else f"{error}; {remedy}") from None


def texts_of(lines: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """[qid, candidate] of every text of a file, in order; the one text of a question is its candidate 0."""
    return [[line["qid"], each["candidate"]] for line in lines for each in line.get("candidates", ({"candidate": 0},))]
