"""The command ``mmcot``. Each command imports heavy libraries only when it runs."""

from __future__ import annotations

import typer

from launcher.cli.data import data_app
from launcher.cli.mlflow import mlflow_app, sync_app
from launcher.cli.models import models_app
from launcher.cli.options import Config, Preset, Set, errors_as_messages
from launcher.cli.run import run_app

app = typer.Typer(
    help="Train small multimodal models that write their reasoning, from a laptop to a cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Show settings.", no_args_is_help=True)
for commands in (run_app, models_app, sync_app):
    app.add_typer(commands)
for name, group in {"data": data_app, "config": config_app, "mlflow": mlflow_app}.items():
    app.add_typer(group, name=name)


@config_app.command("show")
def config_show(preset: Preset = None, config: Config = None, set_: Set = []) -> None:
    """Print the resolved settings, every default included."""
    with errors_as_messages():
        from launcher.config.loading import dump_settings, load_settings, preset_names

        if preset is None and config is None:
            typer.echo(f"presets: {', '.join(preset_names())}  (show one with --preset NAME)")
        else:
            typer.echo(dump_settings(load_settings(preset=preset, config=config, overrides=set_)), nl=False)
