"""Errors that a user can put right.

All errors of the three packages derive from ``MmcotError``; their messages say what is wrong, where, the value, what
was expected and what to do. An error of any other type that reaches the command line is a bug.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


class MmcotError(Exception):
    """An error whose message is for the user."""


class InputError(MmcotError, ValueError):
    """Something that was given cannot be used as it is.

    Attributes:
        problem: the message without its place.
        file: the file in which it is, if it is in one.
        line: its line.
        member: its place in a file without lines: the member of a tar, the key of a JSON object, the row of a table.
    """

    file: str | None = None
    line: int | None = None
    member: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problem = message

    def at(self, file: object, *, line: int | None = None, member: str | None = None) -> InputError:
        """Return the same error with its place, in the message and as attributes."""
        places = [str(file), *([f"line {line}"] if line is not None else []), *([member] if member else [])]
        error = type(self)(f"{', '.join(places)}: {self.problem}")
        error.problem, error.file, error.line, error.member = self.problem, str(file), line, member
        return error


class FaultsError(InputError):
    """Several faults of one data set, a line for each; ``faults`` are the first of them, ``total`` counts all."""

    def __init__(self, faults: Sequence[MmcotError], total: int) -> None:
        more = total - len(faults)
        lines = [str(fault).replace("\n", " ") for fault in faults]
        super().__init__("\n".join([*lines, f"{total:,} faults in all" + (f", {more:,} not shown" if more else "")]))
        self.faults, self.total = list(faults), total

    def __reduce__(self) -> tuple[Any, ...]:  # it is sent from workers
        return type(self), (self.faults, self.total)


def faults_as_json(error: InputError) -> dict[str, Any]:
    """The faults that an error tells, as JSON types: their number, and of the first ones file, place and problem."""
    faults, total = (error.faults, error.total) if isinstance(error, FaultsError) else ([error], 1)
    return {
        "num_faults": total,
        "faults": [
            {
                **{name: getattr(fault, name, None) for name in ("file", "line", "member")},
                "problem": getattr(fault, "problem", str(fault)),
            }
            for fault in faults
        ],
    }


class Faults:
    """Gathers the faults of one data set, to tell them together.

    for line, row in rows:
        with faults.gathered(file, line=line):
            ...                                  # an InputError here is kept, with this place
    faults.raise_any()
    """

    MOST = 20  # are kept; further ones are counted

    def __init__(self) -> None:
        self.first: list[MmcotError] = []
        self.total = 0

    def add(self, fault: MmcotError) -> None:
        """Keep a fault, or count it where there are many."""
        self.total += 1
        if len(self.first) < self.MOST:
            self.first.append(fault)

    @contextlib.contextmanager
    def gathered(self, file: object, *, line: int | None = None, member: str | None = None) -> Iterator[None]:
        """Keep an ``InputError`` of the block, with its place if it has none."""
        try:
            yield
        except InputError as error:
            self.add(error if error.file else error.at(file, line=line, member=member))

    def raise_any(self) -> None:
        """Raise what was gathered.

        Raises:
            MmcotError: there was one fault, which is raised itself.
            FaultsError: there were several.
        """
        if self.total == 1:
            raise self.first[0]
        if self.total:
            raise FaultsError(self.first, self.total)


class MissingFileError(MmcotError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class MissingPackageError(MmcotError, ImportError):
    """A package is needed that is not installed; the message says how to install it."""


class OperationError(MmcotError, RuntimeError):
    """Something could not be done, for a reason outside of what was given."""


class BusyError(MmcotError, TimeoutError):
    """Another process holds what is needed."""
