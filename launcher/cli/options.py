"""Options that commands share, and the printing of errors as one message."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option(help="Name of built-in settings, such as demo.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings, which override the preset.")]
Set = Annotated[list[str], typer.Option("--set", help="One setting: section.key=value. May be repeated.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


Column = Annotated[
    list[str], typer.Option(help="A field's column where it has another name: question=text; repeatable.")
]

AllowExtensions = Annotated[
    bool,
    typer.Option(
        "--allow-extensions",
        help="Import the modules that the run names as extensions, if they are those it started with.",
    ),
]

Adopt = Annotated[
    bool, typer.Option("--adopt", help="Make a copied run folder a run of its own, with a new id, and continue it.")
]


def allow(folders: list[Path], allowed: bool) -> None:
    """Import the extensions of runs, where the user allows it."""
    if allowed:
        from launcher.runs.run_settings import allow_extensions

        for folder in folders:
            allow_extensions(folder)


def columns_of(arguments: list[str]) -> dict[str, str]:
    """Return the columns of fields that ``--column`` names.

    Raises:
        InputError: an argument is no field and column, or a field is given twice.
    """
    from mmcot.errors import InputError

    columns: dict[str, str] = {}
    for argument in arguments:
        field, equals, name = argument.partition("=")
        if not equals or field in columns:
            wrong = f"gives {field} a second column" if equals else "has no ="
            raise InputError(f"--column {argument!r} {wrong}; expected a field and its column, once: question=text")
        columns[field] = name
    return columns


def say(line: str, *, err: bool = False, fg: str | None = None) -> None:
    """Print a line to the console; after the pipe or terminal is closed the work continues without output."""
    try:
        typer.secho(line, err=err, fg=fg)
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2 if err else 1)
        os.close(devnull)


def printable(name: object) -> str:
    """A name of a file as text that can be printed, bytes that are no UTF-8 as escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode()


class errors_as_messages:  # noqa: N801, used like a function: `with errors_as_messages():`
    """Prints an error as one message and exits: status 1 for what a user can put right, 70 for a bug of ours."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json  # the faults of a data set are one JSON object on standard output

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from launcher.runs.signals import STOPPED, Stopped
        from mmcot.errors import InputError, faults_as_json

        if isinstance(error, Stopped):
            say(str(error))
            raise typer.Exit(STOPPED) from None
        if isinstance(error, KeyboardInterrupt):  # where no checkpoint is written first
            say("stopped by Ctrl-C; what was committed is kept", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        if isinstance(error, BrokenPipeError):  # what reads the output was closed, as by `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(128 + signal.SIGPIPE) from None
        if isinstance(error, Exception) and not isinstance(error, _OF_TYPER):
            if self.as_json and isinstance(error, InputError):
                typer.echo(json.dumps(faults_as_json(error), indent=2))
                raise typer.Exit(1) from None
            raise typer.Exit(_tell(error)) from None


_OF_TYPER = (typer.Exit, typer.Abort, typer.BadParameter)


def _tell(error: Exception) -> int:
    """Print an error; returns the exit status."""
    from launcher.cli.bugs import BUG_STATUS, DEBUG, describe_bug, describe_system_error
    from launcher.config.settings import SettingsError
    from mmcot.errors import FaultsError, MmcotError

    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, MmcotError):
        several = isinstance(error, SettingsError | FaultsError)  # a line for each setting, and for each fault
        lines, status = str(error).splitlines() if several else [str(error)], 1
    elif isinstance(error, MemoryError):
        lines, status = ["there is not enough memory; close other programs, or give smaller batches or models"], 1
    elif isinstance(error, OSError) and (line := describe_system_error(error)):
        lines, status = [line], 1
    else:
        lines, status = [describe_bug(error)], BUG_STATUS
    for line in lines:
        say(f"error: {line}", fg="red", err=True)
    return status
