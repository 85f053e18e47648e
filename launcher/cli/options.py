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


class errors_as_messages:  # noqa: N801, used like a function: `with errors_as_messages():`
    """Turns errors that carry their remedy into one message and exit status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from launcher.runs.signals import STOPPED, Stopped

        if isinstance(error, Stopped):
            say(str(error))
            raise typer.Exit(STOPPED) from None
        if isinstance(error, KeyboardInterrupt):  # where there is nothing to finish first
            say("stopped by Ctrl-C; what was committed stands", err=True)
            raise typer.Exit(128 + signal.SIGINT) from None
        if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
            say(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None


def run_until(
    step: str, preset: str | None, config: Path | None, overrides: list[str], write_job: Path | None = None
) -> None:
    """Run the pipeline up to a step and show where the run lies."""
    with errors_as_messages():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset, config=config, overrides=overrides)
        from launcher.pipeline.pipeline import run_pipeline
        from launcher.runs.status import describe_end

        run_dir = run_pipeline(settings, until=step, report=say, write_job=write_job)
        for line in describe_end(settings, run_dir):
            say(line)
