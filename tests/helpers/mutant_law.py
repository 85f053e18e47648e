"""What must hold of a damaged input, whichever damage it is.

(a) It is read, or refused by an error of ours, or by the system's where the system refused the file; within seconds and
    without gigabytes.
(b) An error names the file and the place in it, and says what to do.
(c) What is read in spite of the damage holds the same samples, or a sentence says what is different.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from damaged_inputs import Input, Read, make_inputs
from mutants import Change, mutate

from mmcot.errors import MmcotError

LIMIT_S = 10.0
LIMIT_KB = 1 << 20  # of growth: a GB
# A remedy has one of these, as a command or as the name of what does it.
_REMEDY = re.compile(
    r"\b(restore|delete|remove|save|write|give|make|build|download|fetch|run|set|put|rename|add|use|keep|convert|leave|"
    r"did you mean|lists all|lists the settings|must have|"
    r"choose|index|take|correct|start|do not|expected|copy|move|mend|quote|close|lower|separate|shorten|"
    r"is needed|needs|is written|must be)\b"
)
_PLACE = re.compile(
    r"line ['\d]|byte \d|character \d|\bkey\b|question|step|\brow\b|member|split|field|column|shard|list|sha256"
)


class TooSlow(BaseException):
    """A reader did not end in time."""


@dataclasses.dataclass(frozen=True)
class Broken:
    """A mutant for which the law does not hold."""

    law: str
    seed: int
    input: str
    reader: str
    file: str
    change: str
    said: str

    def __str__(self) -> str:
        return (
            f"({self.law}) seed {self.seed}, input {self.input!r}, reader {self.reader!r}, {self.file}: {self.change}\n"
            f"{self.said}"
        )


class Trials:
    """Damages inputs and reads them: ``trial(seed)`` is always the same mutant."""

    def __init__(self, inputs: dict[str, Input]) -> None:
        self.inputs = inputs
        # Reading some costs a tenth of a second: their turn comes a third as often.
        quick = [name for name, each in inputs.items() if not each.is_slow]
        self._turns = [*quick, *quick, *inputs]
        self._before: dict[tuple[str, str], Read] = {}

    def before(self, each: Input, reader: str) -> Read:
        """What is read of the valid input."""
        if (each.name, reader) not in self._before:
            self._before[each.name, reader] = each.readers[reader](each.folder)
            each.restore()
        return self._before[each.name, reader]

    def trial(self, seed: int) -> tuple[Input, Path, Change, list[Broken]]:
        """Damage the input of a seed's turn once, and read it in every way."""
        draw = random.Random(seed)
        each = self.inputs[self._turns[seed % len(self._turns)]]
        for reader in each.readers:
            self.before(each, reader)
        broken: list[Broken] = []
        path, change = each.folder, Change("")
        for reader in each.readers:
            state = draw.getstate()
            path = draw.choice(each.files())
            change = mutate(path, draw)
            draw.setstate(state)
            found = self._judge(each, reader, path, change)
            if found:
                file = str(path.relative_to(each.folder))
                broken.append(Broken(found[0], seed, each.name, reader, file, change.label, found[1]))
            each.restore()
        return each, path, change, broken

    def _judge(self, each: Input, reader: str, path: Path, change: Change) -> tuple[str, str] | None:
        """The law that does not hold, and what was said; None where all hold."""
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with _limited(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                after = each.readers[reader](each.folder)
        except TooSlow:
            return "a: slow", traceback.format_exc()
        except MmcotError as error:
            return _fault_of_message(error, each, path)
        except OSError as error:
            refused = error.filename is not None and isinstance(
                error, PermissionError | FileNotFoundError | IsADirectoryError | NotADirectoryError
            )
            return None if refused and not path.is_file() else ("a: system", traceback.format_exc())
        except Exception:
            return "a: bug", traceback.format_exc()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used > LIMIT_KB:
            return "a: memory", "more than a GB of memory"
        return _difference(each, self.before(each, reader), after, change)


def _fault_of_message(error: MmcotError, each: Input, path: Path) -> tuple[str, str] | None:
    said = str(error)
    is_missing = each.name == "settings" and "are missing" in said  # in the file, the preset and the command together
    if path.name not in said and str(each.folder) not in said and not is_missing:
        return "b: no file", traceback.format_exc()
    if not _REMEDY.search(said):
        return "b: no remedy", traceback.format_exc()
    if (
        path.suffix in (".csv", ".jsonl")
        and not each.is_sealed
        and path.is_file()
        and path.stat().st_size > 100
        and not _PLACE.search(said)
    ):
        return "b: no place", traceback.format_exc()
    return None


def _difference(each: Input, before: Read, after: Read, change: Change) -> tuple[str, str] | None:
    """How an accepted input differs without a sentence that says so."""
    if after.notes != before.notes:
        return None
    # Who seals an altered manifest again has made another one, but it may not lead to other samples.
    resealed = change.label.endswith("sealed again")
    same = _text(after.samples) == _text(before.samples)
    if each.is_sealed and not (same and (resealed or _text(after.content) == _text(before.content))):
        return "c: sealed", f"was {_text(before.content)[:300]}\nis  {_text(after.content)[:300]}"
    if change.keeps and len(after.samples) < len(before.samples):
        return "c: fewer", f"{len(before.samples)} samples before, {len(after.samples)} now, nothing said"
    if change.one_place:
        kept = [qid for qid, facts in before.samples.items() if _text(after.samples.get(qid)) == _text(facts)]
        if len(kept) < len(before.samples) - 1:
            return "c: altered", f"{len(before.samples) - len(kept)} samples differ, nothing said"
    return None


def _text(value: Any) -> str:
    text = json.dumps(value, default=str, sort_keys=True)
    return text.replace("\\r\\n", "\\n").replace("\\r", "\\n")  # in a field of several lines they are the text's


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raise ``TooSlow`` in a block that takes too long."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":  # python tests/helpers/mutant_law.py SEED ...
    with tempfile.TemporaryDirectory() as folder:
        made = Trials(make_inputs(Path(folder)))
        for wanted in map(int, sys.argv[1:]):
            tried, damaged, what, found = made.trial(wanted)
            print(
                f"seed {wanted}: {tried.name}, {damaged.name}: {what.label}", *(found or ["as it should be"]), sep="\n"
            )
