"""The command ``mmcot``. Each command imports heavy libraries only when it runs."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from launcher.cli.bugs import DEBUG
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
config_app = typer.Typer(help="Show and explain settings.", no_args_is_help=True)
for commands in (run_app, models_app, sync_app):
    app.add_typer(commands)
for name, group in {"data": data_app, "config": config_app, "mlflow": mlflow_app}.items():
    app.add_typer(group, name=name)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Train small multimodal models that write their reasoning, from a laptop to a cluster."""
    if debug:
        os.environ[DEBUG] = "1"
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"mmcot {version_of('mmcot')}")
        raise typer.Exit


@config_app.command("show")
def config_show(preset: Preset = None, config: Config = None, set_: Set = []) -> None:
    """Print the resolved settings as YAML, every default included."""
    with errors_as_messages():
        from launcher.config.loading import dump_settings, load_settings, preset_names

        if preset is None and config is None:
            typer.echo(f"presets: {', '.join(preset_names())}  (show one with --preset NAME)")
        else:
            typer.echo(dump_settings(load_settings(preset=preset, config=config, overrides=set_)), nl=False)


@config_app.command("explain")
def config_explain(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Settings or sections, such as training; none: all.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    page: Annotated[bool, typer.Option("--page", help="Print the page docs/settings.md.")] = False,
) -> None:
    """Explain settings: type, unit, default, meaning; with a preset or file also the value and where it comes from."""
    with errors_as_messages():
        import json

        from launcher.config.explanations import source_of
        from launcher.config.loading import load_settings, setting_layers, value_of
        from launcher.config.reference import all_settings, setting_named, settings_page

        if page:
            typer.echo(settings_page(), nl=False)
            return
        chosen = [each for name in names for each in setting_named(name)] if names else all_settings()
        has_values = bool(preset or config or set_)
        layers = setting_layers(preset=preset, config=config, overrides=set_) if has_values else []
        settings = load_settings(preset=preset, config=config, overrides=set_) if has_values else None
        for each in chosen:
            shown = json.dumps(value_of(settings, each.name), ensure_ascii=False) if settings else ""
            value = f" = {shown}, from {source_of(each.name, layers)}" if settings else ""
            unit = f", in {each.unit}" if each.unit else ""
            typer.echo(f"{each.name}{value}\n    {each.type}{unit}; default {each.default}\n    {each.meaning}")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of a settings file, for editors and checks."""
    import json

    from launcher.config.reference import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
