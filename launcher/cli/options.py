"""Options that commands share, and the printing of errors as one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option(help="Name of built-in settings, such as demo.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings, which override the preset.")]
Set = Annotated[list[str], typer.Option("--set", help="One setting: section.key=value. May be repeated.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


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


def say(line: str, *, err: bool = False, fg: str | None = None) -> None:
    """Print a line to the console; after the pipe or terminal is closed the work continues without output."""
    try:
        typer.secho(line, err=err, fg=fg)
    except OSError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 2 if err else 1)
        os.close(devnull)


class errors_as_messages:  # noqa: N801, used like a function: `with errors_as_messages():`
    """Prints an expected error as one message and exits with status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from launcher.runs.signals import STOPPED, Stopped

        if isinstance(error, Stopped):
            say(str(error))
            raise typer.Exit(STOPPED) from None
        if isinstance(error, KeyboardInterrupt):  # where no checkpoint is written first
            say("stopped by Ctrl-C; what was committed is kept", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        if isinstance(error, BrokenPipeError):  # what reads the output was closed, as by `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(128 + signal.SIGPIPE) from None
        if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
            from launcher.config.settings import SettingsError

            several = isinstance(error, SettingsError)  # a line for each setting
            for line in str(error).splitlines() if several else [str(error)]:
                say(f"error: {line}", fg="red", err=True)
            raise typer.Exit(1) from None
