"""The command ``mmcot``. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train small multimodal models that write their reasons down, from a laptop to a cluster.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
data_app = typer.Typer(help="Make, shard and check data.", no_args_is_help=True)
train_app = typer.Typer(help="Train one stage.", no_args_is_help=True)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(config_app, name="config")

Preset = Annotated[str | None, typer.Option(help="Shipped settings, such as demo.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file of settings, laid over the preset.")]
Set = Annotated[list[str], typer.Option("--set", help="One setting: section.key=value. May be repeated.")]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run, such as runs/demo.")]


@app.command()
def run(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Run the whole pipeline: data, stage one, rationales, stage two, scores. Run again to go on."""
    _run_until("evaluate", preset, config, set_)


@app.command()
def rationales(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Run the pipeline up to the rationales of all splits."""
    _run_until("rationales", preset, config, set_)


@app.command()
def evaluate(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Answer the validation and the test split, score them, and whatever must come before."""
    _run_until("evaluate", preset, config, set_)


@train_app.command("rationale")
def train_rationale(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Train stage one, which writes the rationale."""
    _run_until("train-rationale", preset, config, set_)


@train_app.command("answer")
def train_answer(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Train stage two, which reads the rationale and answers, and whatever must come before."""
    _run_until("train-answer", preset, config, set_)


@data_app.command("make")
def data_make(
    output: Annotated[Path, typer.Argument(help="Folder to write, in ScienceQA's layout.")],
    num_train: Annotated[int, typer.Option(help="Training questions.")] = 4000,
    num_val: Annotated[int, typer.Option(help="Validation questions.")] = 400,
    num_test: Annotated[int, typer.Option(help="Test questions.")] = 800,
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
) -> None:
    """Write MiniSQA, the embedded data set."""
    from data_shards.mini_sqa import write_mini_sqa

    with _explained():
        write_mini_sqa(output, num_train=num_train, num_val=num_val, num_test=num_test, seed=seed)
        typer.echo(f"{output}: {num_train:,} train, {num_val:,} val, {num_test:,} test questions")


@data_app.command("shard")
def data_shard(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Build text and feature shards, their indexes and the tokenizer."""
    with _explained():
        from launcher.config import load_settings
        from launcher.data import describe_data, prepare_data

        folder = prepare_data(load_settings(preset=preset, config=config, overrides=set_), typer.echo)
        for line in describe_data(folder):
            typer.echo(line)


@data_app.command("check")
def data_check(shards: Annotated[Path, typer.Argument(help="A data folder.")]) -> None:
    """Hold every shard against its manifest: size, checksum, index, order of keys."""
    with _explained():
        from launcher.data import check_data

        typer.echo(f"{check_data(shards, typer.echo):,} samples in order")


@config_app.command("show")
def config_show(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Print the resolved settings, every default included."""
    with _explained():
        from launcher.config import dump_settings, load_settings, preset_names

        if preset is None and config is None:
            typer.echo(f"presets: {', '.join(preset_names())}  (show one with --preset NAME)")
        else:
            typer.echo(dump_settings(load_settings(preset=preset, config=config, overrides=set_)), nl=False)


@app.command()
def status(folder: RunFolder) -> None:
    """Say what a run has done, what it is doing and where it lies in MLflow."""
    with _explained():
        from launcher.status import describe_run

        for line in describe_run(folder):
            typer.echo(line)


def _run_until(step: str, preset: str | None, config: Path | None, overrides: list[str]) -> None:
    with _explained():
        from launcher.config import load_settings

        settings = load_settings(preset=preset, config=config, overrides=overrides)
        from launcher.pipeline import run_pipeline
        from launcher.status import describe_end

        run_dir = run_pipeline(settings, until=step, report=typer.echo)
        for line in describe_end(settings, run_dir):
            typer.echo(line)


class _explained:
    """Turns errors that carry their remedy into one message and exit status 1."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, RuntimeError, FileNotFoundError)):
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from None
