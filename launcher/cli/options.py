"""What all commands share: options, and errors that carry their remedy as one message."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option(help="Shipped settings, such as demo.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings, laid over the preset.")]
Set = Annotated[list[str], typer.Option("--set", help="One setting: section.key=value. May be repeated.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


def say(line: str, *, err: bool = False, fg: str | None = None) -> None:
    """Print a line for a person; where nobody reads any longer (a closed pipe or terminal) the work goes on without."""
    try:
        typer.secho(line, err=err, fg=fg)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2 if err else 1)
        os.close(nowhere)


class explained:
    """Turns errors that carry their remedy into one message and exit status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from launcher.runs.signals import STOPPED
        from launcher.runs.run_dir import Stopped

        if isinstance(error, Stopped):
            say(str(error))
            raise typer.Exit(STOPPED) from None
        if isinstance(error, KeyboardInterrupt):  # where there is nothing to finish first
            say("stopped by Ctrl-C; what was committed stands", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
            say(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None
