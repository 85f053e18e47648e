"""What all commands share: options, and errors that carry their remedy as one message."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option(help="Shipped settings, such as demo.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings, laid over the preset.")]
Set = Annotated[list[str], typer.Option("--set", help="One setting: section.key=value. May be repeated.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


class explained:
    """Turns errors that carry their remedy into one message and exit status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        from launcher.run_dir import Stopped

        if isinstance(error, Stopped):
            typer.echo(str(error))
            raise typer.Exit(128 + 15) from None
        if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None
