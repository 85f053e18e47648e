"""The commands that run a pipeline or show a run: run, train, rationales, tune, ablate, submit, status, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import (
    Adopt,
    AllowExtensions,
    Config,
    Preset,
    RunFolder,
    Set,
    allow,
    errors_as_messages,
    say,
)
from launcher.cli.running import run_until
from mmcot.errors import InputError

run_app = typer.Typer()

WriteJob = Annotated[
    Path | None, typer.Option(help="Write this training for `torchrun -m launcher.rank FILE` instead of running it.")
]


_WORDS = (
    "Words of the output. padding factor: tokens computed over tokens needed. imbalance: tokens of the busiest worker "
    "over those of the mean one. goodput: the share of the time in steps that count. NAT, SOC, LAN: accuracy over "
    "questions of natural, social and language science. TXT, IMG, NO: over questions with a text context, with a "
    "picture, with neither. G1-6, G7-12: by grade. AVG: over all. ceiling: the best accuracy without the picture. "
    "QCM→A: question, context and choices in, the answer out. All words: docs/glossary.md."
)


@run_app.command(epilog=_WORDS)
def run(
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    adopt: Adopt = False,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Continue here a run whose owner elsewhere can do nothing any more.")
    ] = False,
) -> None:
    """Run the whole pipeline: data, stage one, rationales, stage two, scores. Run again to resume."""
    run_until(None, preset, config, set_, adopt=adopt, take_over=take_over)


@run_app.command()
def submit(
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    follow: Annotated[bool, typer.Option(help="Show the run's output until it ends, and exit with its status.")] = True,
) -> None:
    """Send the run to a Ray cluster as a job, with this installation's code, without data. Submit again to resume."""
    with errors_as_messages():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset, config=config, overrides=set_)
        from launcher.cluster.job_submission import submit_run

        status = submit_run(settings, address=address, follow=follow, report=say)
    if status:
        raise typer.Exit(status)


@run_app.command()
def tune(
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    num_samples: Annotated[int | None, typer.Option(min=1, help="Number of trials; sets tuning.num_samples.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at the same time; sets tuning.max_concurrent.")
    ] = None,
    adopt: Adopt = False,
) -> None:
    """Search the settings of tuning.space with Ray Tune. Run again to resume."""
    with errors_as_messages():
        from launcher.config.loading import load_settings

        given = {"num_samples": num_samples, "max_concurrent": max_concurrent}
        extra = [f"tuning.{name}={value}" for name, value in given.items() if value is not None]
        settings = load_settings(preset=preset, config=config, overrides=[*set_, *extra])
        from launcher.runs.run_settings import of_moved_folder

        settings = of_moved_folder(settings, config, set_)
        from launcher.cli.console import open_console
        from launcher.runs.progress import Phase

        with open_console() as console:
            console(Phase("loading"))
            from launcher.runs.status import mlflow_lines
            from launcher.tuning.tune import run_tuning

            run_dir = run_tuning(settings, report=console, adopt=adopt)
        for line in (f"\ntuning: {run_dir.path}", *mlflow_lines(settings, run_dir)):
            say(line)


@run_app.command()
def ablate(preset: Preset = None, config: Config = None, set_: Set = [], adopt: Adopt = False) -> None:
    """Compare arms (chains, vision, rationales) over seeds in one table; default: the paper's on MiniSQA."""
    with errors_as_messages():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset or (None if config else "ablation"), config=config, overrides=set_)
        from launcher.runs.run_settings import of_moved_folder

        settings = of_moved_folder(settings, config, set_)
        from launcher.cli.console import open_console
        from launcher.runs.progress import Phase

        with open_console() as console:
            console(Phase("loading"))
            from launcher.runs.status import mlflow_lines
            from launcher.tuning.ablation import run_ablation

            run_dir = run_ablation(settings, report=console, adopt=adopt)
        for line in (f"\nablation: {run_dir.path / 'ablation.md'}", *mlflow_lines(settings, run_dir)):
            say(line)


@run_app.command()
def rationales(
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    model: Annotated[
        Path | None, typer.Option(help="Folder of a stage-one model; default: run the pipeline up to the rationales.")
    ] = None,
    shards: Annotated[str | None, typer.Option(help="The data folder, or its URL.")] = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder for the rationales; only missing ones are written.")] = None,
) -> None:
    """Write rationales: of a run (the pipeline up to there), or by any model over any shards."""
    if model is None:
        run_until("rationales", preset, config, set_)
        return
    with errors_as_messages():
        if shards is None or out is None or split not in ("train", "val", "test", "all") or preset or config:
            raise InputError(
                "--model needs --shards DIR, --out DIR and a --split of train, val, test or all; settings only by --set"
            )
        from launcher.cli.console import open_console
        from launcher.generation.standalone import write_rationales

        with open_console() as console:
            write_rationales(model, shards, split, out, overrides=set_, report=console)


@run_app.command()
def train(
    stage: Annotated[str, typer.Argument(help="A stage of the chain, such as rationale or answer.")],
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    write_job: WriteJob = None,
    adopt: Adopt = False,
) -> None:
    """Train one stage, after all steps that it needs."""
    run_until(f"train-{stage}", preset, config, set_, write_job, adopt)


@run_app.command()
def status(folder: RunFolder, allow_extensions: AllowExtensions = False) -> None:
    """Show the finished steps of a run, its progress and its page in MLflow."""
    with errors_as_messages():
        allow([folder], allow_extensions)
        from launcher.runs.status import describe_run

        for line in describe_run(folder):
            typer.echo(line)


@run_app.command("report")
def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="The folder of a run, finished or not; several are compared."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="File to write; default RUN/report.html, or report.html for several.")
    ] = None,
    pictures: Annotated[
        int, typer.Option(min=0, help="Pictures embedded of each split, wrong answers first; more where they are tiny.")
    ] = 200,
    looking: Annotated[
        int, typer.Option(min=0, help="Questions whose attention is measured, wrong answers first.")
    ] = 24,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Write an HTML report: scores, curves, questions, attention over pictures. One file, no network."""
    with errors_as_messages():
        allow(folders, allow_extensions)
        from launcher.cli.console import open_console
        from launcher.report.render import write_report
        from launcher.runs.progress import Phase

        target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
        with open_console() as console:
            console(Phase("  writing the report"))
            path = write_report(folders, target, num_pictures=pictures, num_looked_at=looking)
        typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")
