"""The file of ``mmcot predict --output``: a line for every row of the input, in its order, written bulk by bulk.

    answers.jsonl                 {"qid": "a1", "rationale": "..", "answer_text": "...", "prediction": 1, "choice": "x"}
                                  {"qid": null, "line": 2, "error": "no valid JSON (Expecting value at character 1)"}
    answers.csv                   qid,rationale,answer_text,prediction,choice,error
    answers.jsonl.made-by.json    {"models": {"answer": "<sha256>"}, "settings": "...", "input": "<sha256>", "rows": 2}

Every bulk is flushed to the disk, so a command that is killed leaves whole lines and at most one that is cut off. The
file beside it says which models answered which input. Only the same command continues the lines; the file stays when
they are complete, so that the command can be repeated. A CSV begins with a byte order mark, by which spreadsheet
programs recognise UTF-8; values are written as they are.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from data_shards.atomic_files import commit_bytes
from launcher.generation.predict_rows import Row
from mmcot.errors import BusyError, InputError, OperationError

FORMS = (".jsonl", ".csv")
_COLUMNS = ("qid", "rationale", "answer_text", "prediction", "choice")


class JsonLines:
    """Rows as lines of JSON."""

    head = b""

    def encode(self, answer: dict[str, Any]) -> bytes:
        """Return a line."""
        return f"{json.dumps(answer, ensure_ascii=False)}\n".encode()

    def split(self, data: bytes) -> list[bytes]:
        """Divide into lines; the last has no end if it was cut off."""
        return [*_lines(data)]

    def decode(self, line: bytes) -> dict[str, Any]:
        """Read a line; ``ValueError`` or ``KeyError`` if it is none of ours."""
        answer = json.loads(line)
        return {"qid": answer["qid"], "error": answer.get("error", "")}


class CsvRows:
    """Rows of CSV.

    Args:
        names: of the texts that are neither rationale nor answer, each a column ``texts.<name>``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        csv.field_size_limit(2**31 - 1)
        self._names = names
        self._columns = [*_COLUMNS, *(f"texts.{name}" for name in names), "error"]
        self.head = b"\xef\xbb\xbf" + self._write(self._columns)

    def encode(self, answer: dict[str, Any]) -> bytes:
        """Return a row; what is None is an empty field."""
        error = f"line {answer['line']}: {answer['error']}" if "error" in answer else None
        texts = [answer.get("texts", {}).get(name) for name in self._names]
        return self._write([*(answer.get(name) for name in _COLUMNS), *texts, error])

    def split(self, data: bytes) -> list[bytes]:
        """Divide into rows, which end at line ends outside of quotes."""
        rows, row = [], b""
        for line in _lines(data):
            row += line
            if row.count(b'"') % 2 == 0:
                rows.append(row)
                row = b""
        return [*rows, *([row] if row else [])]

    def decode(self, line: bytes) -> dict[str, Any]:
        """Read a row; ``ValueError`` if it is none of ours."""
        fields = next(csv.reader(io.StringIO(line.decode(), newline=""), strict=True))
        answer = dict(zip(self._columns, fields, strict=True))
        return {"qid": answer["qid"] or None, "error": answer["error"]}

    def _write(self, fields: Sequence[Any]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\r\n").writerow(fields)  # with which both characters are quoted in fields
        return text.getvalue().encode()


class AnswersFile:
    """A file of answers that is continued; ``num_kept`` lines were in it, ``num_errors`` of all lines are errors."""

    def __init__(self, path: Path, form: JsonLines | CsvRows, file: BinaryIO, kept: list[dict[str, Any]]) -> None:
        self._path, self._form, self._file = path, form, file
        self.num_kept, self.num_errors = len(kept), sum(bool(answer["error"]) for answer in kept)

    def append(self, answers: Sequence[dict[str, Any]]) -> None:
        """Write lines to the disk.

        Raises:
            OperationError: the disk is full, or cannot be written to.
        """
        self.num_errors += sum("error" in answer for answer in answers)
        self.write(b"".join(map(self._form.encode, answers)))

    def write(self, data: bytes) -> None:
        """Write bytes to the disk."""
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OperationError(
                f"{self._path} cannot be written further ({error.strerror}); the answers in it are kept: make room, "
                "and run the same command again"
            ) from None


def check_output(output: Path, input: Path) -> None:
    """Check, before any work, that answers can be written to a file.

    Raises:
        InputError: it has an unknown ending, is a folder, or is the input itself.
        OSError: its folder cannot be made or written to; with the file's name.
    """
    if output.suffix not in FORMS:
        raise InputError(f"--output {output} ends with {output.suffix!r}; expected a name in .jsonl or .csv")
    if output.is_dir():
        raise InputError(f"--output {output} is a folder; name a file in it, such as {output / 'answers.jsonl'}")
    for path in (output, made_by_path(output)):
        if path.exists() and input.exists() and os.path.samefile(path, input):
            raise InputError(f"--output {output} would overwrite --input {input}; name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    existing = output if output.exists() else output.parent
    if not os.access(existing, os.W_OK):
        raise InputError(f"--output {output} cannot be written: {existing} is read-only for this user; name another")


def made_by_path(output: Path) -> Path:
    """The file that says which models and input the lines of ``output`` are of."""
    return output.with_name(f"{output.name}.made-by.json")


@contextlib.contextmanager
def open_answers(
    path: Path, made_by: dict[str, Any], rows: Sequence[Row], *, names: Sequence[str], report: Callable[[str], None]
) -> Iterator[AnswersFile]:
    """Open a file of answers, a new one or what an earlier command has left of it.

    Args:
        made_by: models and input.
        rows: the rows of the input.
        names: as of ``CsvRows``.
        report: gets sentences on what is kept and removed.

    Raises:
        InputError: the file has lines of something else.
        BusyError: another process writes to it.
    """
    form = CsvRows(names) if path.suffix == ".csv" else JsonLines()
    if not made_by_path(path).exists() and path.exists() and path.stat().st_size:
        raise _not_ours(path, f"there is no {made_by_path(path).name} that says which models it is of")
    with open(made_by_path(path), "a+b") as mark:
        _lock(mark, path)
        kept = _continue(path, form, made_by, rows, mark, report)
        with open(path, "ab") as file:
            answers = AnswersFile(path, form, file, kept)
            if not file.tell():
                answers.write(form.head)
            yield answers


def _continue(
    path: Path,
    form: JsonLines | CsvRows,
    made_by: dict[str, Any],
    rows: Sequence[Row],
    mark: BinaryIO,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Return the lines that are kept; what follows the last whole line is removed from the file."""
    data = path.read_bytes() if path.exists() else b""
    if len(data) <= len(form.head) and form.head.startswith(data):
        _begin(path, made_by, mark)
        return []
    _require_same(path, made_by, mark)
    if not data.startswith(form.head):
        raise _not_ours(path, "its first line has other columns")
    lines = form.split(data[len(form.head) :])
    cut = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
    kept = [_read_line(path, form, line, number, rows) for number, line in enumerate(lines)]
    if cut:
        os.truncate(path, len(data) - len(cut))
        report(f"{path}: its last line was cut off ({len(cut):,} bytes) and is removed; its row is answered again")
    report(f"{len(kept):,} of {len(rows):,} rows are in {path} and are kept")
    return kept


def _begin(path: Path, made_by: dict[str, Any], mark: BinaryIO) -> None:
    mark.truncate(0)
    mark.write((json.dumps(made_by, indent=2) + "\n").encode())
    mark.flush()
    os.fsync(mark.fileno())
    if path.exists():
        os.truncate(path, 0)
    else:
        commit_bytes(path, b"")  # its name is on the disk from here on


def _require_same(path: Path, made_by: dict[str, Any], mark: BinaryIO) -> None:
    mark.seek(0)
    try:
        found = json.loads(mark.read())
        differing = [name for name in made_by if found[name] != made_by[name]]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(path, f"{made_by_path(path).name} cannot be read") from None
    said = {
        "models": "its answers are of other models",
        "settings": "its answers are of other settings of these models",
        "input": "its answers are to another input, or the input was changed",
    }
    if differing:
        raise _not_ours(path, said.get(differing[0], f"{differing[0]} differs"))


def _read_line(path: Path, form: JsonLines | CsvRows, line: bytes, number: int, rows: Sequence[Row]) -> dict[str, Any]:
    if number >= len(rows):
        raise _not_ours(path, f"it has more lines than the input has rows ({len(rows):,})")
    try:
        answer = form.decode(line)
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, StopIteration):
        raise _not_ours(path, f"its line for row {number + 1} is no answer") from None
    if answer["qid"] != rows[number].qid:
        raise _not_ours(
            path, f"it answers {answer['qid']!r} in the place of {rows[number].qid!r}, the id of row {number + 1}"
        )
    return answer


def _not_ours(path: Path, why: str) -> InputError:
    return InputError(
        f"{path} has lines that this command cannot continue: {why}; remove the file, or name another with --output"
    )


def _lock(mark: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(f"another command writes to {path}; wait for its end, or name another file") from None
    except OSError:  # a file system without locks
        return


def _lines(data: bytes) -> Iterator[bytes]:
    """The lines of a text with their ends, which are line feeds alone."""
    parts = data.split(b"\n")
    yield from (part + b"\n" for part in parts[:-1])
    if parts[-1]:
        yield parts[-1]
