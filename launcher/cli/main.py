"""The command ``mmcot``. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.data import data_app
from launcher.cli.options import Config, Preset, RunFolder, Set, explained, say

app = typer.Typer(
    help="Train small multimodal models that write their reasons down, from a laptop to a cluster.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
train_app = typer.Typer(help="Train one stage.", no_args_is_help=True)
config_app = typer.Typer(help="Look at settings.", no_args_is_help=True)
mlflow_app = typer.Typer(help="Serve MLflow.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(train_app, name="train")
app.add_typer(config_app, name="config")
app.add_typer(mlflow_app, name="mlflow")

WriteJob = Annotated[Path | None, typer.Option(help="Write this training for `torchrun -m launcher.rank FILE` instead of running it.")]


@app.command()
def run(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Run the whole pipeline: data, stage one, rationales, stage two, scores. Run again to go on."""
    _run_until("evaluate", preset, config, set_)


@app.command()
def submit(
    address: Annotated[str, typer.Option(help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    preset: Preset = None, config: Config = None, set_: Set = [],  # noqa: B006
    follow: Annotated[bool, typer.Option(help="Show the run's output until it ends, and end with its status.")] = True,
) -> None:  # fmt: skip
    """Send the run to a Ray cluster as a job; this installation's code goes along, data does not. Send again to go on."""
    with explained():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset, config=config, overrides=set_)
        from launcher.cluster.job_submission import submit_run

        status = submit_run(settings, address=address, follow=follow, report=say)
    if status:
        raise typer.Exit(status)


@app.command()
def tune(
    preset: Preset = None, config: Config = None, set_: Set = [],  # noqa: B006
    num_samples: Annotated[int | None, typer.Option(min=1, help="Trials; as tuning.num_samples.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time; as tuning.max_concurrent.")] = None,
) -> None:  # fmt: skip
    """Search settings with Ray Tune: tuning.space says which. Run again to go on."""
    with explained():
        from launcher.config.loading import load_settings

        given = {"num_samples": num_samples, "max_concurrent": max_concurrent}
        extra = [f"tuning.{name}={value}" for name, value in given.items() if value is not None]
        settings = load_settings(preset=preset, config=config, overrides=[*set_, *extra])
        from launcher.runs.status import mlflow_lines
        from launcher.tuning.tune import run_tuning

        run_dir = run_tuning(settings, report=say)
        for line in (f"\ntuning: {run_dir.path}", *mlflow_lines(settings, run_dir)):
            say(line)


@app.command()
def ablate(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Compare arms (chains, vision, rationales) over seeds: one table. Without settings: the paper's comparison on MiniSQA."""
    with explained():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset or (None if config else "ablation"), config=config, overrides=set_)
        from launcher.tuning.ablation import run_ablation
        from launcher.runs.status import mlflow_lines

        run_dir = run_ablation(settings, report=say)
        for line in (f"\nablation: {run_dir.path / 'ablation.md'}", *mlflow_lines(settings, run_dir)):
            say(line)


@app.command()
def rationales(
    preset: Preset = None, config: Config = None, set_: Set = [],  # noqa: B006
    model: Annotated[Path | None, typer.Option(help="A stage-one model's folder; without: the pipeline up to the rationales.")] = None,
    shards: Annotated[str | None, typer.Option(help="The data folder, or its URL.")] = None,
    split: Annotated[str, typer.Option(help="train, val, test or all.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Folder for the rationales; again: only what is missing is written.")] = None,
) -> None:  # fmt: skip
    """Write rationales: of a run (the pipeline up to there), or by any model over any shards."""
    if model is None:
        _run_until("rationales", preset, config, set_)
        return
    with explained():
        if shards is None or out is None or split not in ("train", "val", "test", "all") or preset or config:
            raise ValueError("--model needs --shards DIR, --out DIR and a --split of train, val, test or all; settings by --set alone")
        from launcher.generation.standalone import write_rationales

        write_rationales(model, shards, split, out, overrides=set_, report=say)


@app.command()
def evaluate(
    preset: Preset = None, config: Config = None, set_: Set = [],  # noqa: B006
    predictions: Annotated[Path | None, typer.Option(help="Score this file instead: ours, the published system's, or ScienceQA's.")] = None,
    data: Annotated[Path | None, typer.Option(help="The data set the file is of.")] = None,
    split: Annotated[str, typer.Option(help="The split the file is of: train, val or test.")] = "test",
    against: Annotated[str | None, typer.Option(help="'paper' prints the published rows beside.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of a scores.json.")] = False,
    rationale_format: Annotated[str, typer.Option(help="Prompt format whose gold rationales are compared with.")] = "QCM-E",
    similarity_model: Annotated[str | None, typer.Option(help="Folder of a sentence model, for the similarity score.")] = None,
    guess_seed: Annotated[int | None, typer.Option(help="Guess unreadable answers, as the published system does.")] = None,
) -> None:  # fmt: skip
    """Answer and score the validation and test splits; or score a file of predictions."""
    if predictions is None:
        _run_until("evaluate", preset, config, set_)
        return
    with explained():
        if data is None or split not in ("train", "val", "test") or against not in (None, "paper"):
            raise ValueError("--predictions needs --data DIR, a --split of train, val or test, and --against paper or nothing")
        import json

        from launcher.evaluation.external_predictions import format_scores, score_file

        scored = score_file(
            predictions, data, split=split, rationale_format=rationale_format,
            similarity_model=similarity_model, guess_seed=guess_seed,
        )  # fmt: skip
        if as_json:
            typer.echo(json.dumps(scored.report, indent=2))
            return
        for line in format_scores(scored, path=predictions, against_paper=against == "paper"):
            typer.echo(line)


@app.command("reference", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def reference_command(context: typer.Context, set_: Set = []) -> None:  # noqa: B006
    """Run a command of the published system as typed: mmcot reference -- <options of its main.py>."""
    with explained():
        from launcher.compat.published_commands import num_gpus, parse_command, run_reference

        run = parse_command(context.args, num_gpus=num_gpus(), overrides=set_)
        typer.echo(f"\n{run_reference(run, report=say)}")


@app.command("import-checkpoint")
def import_checkpoint(
    source: Annotated[Path, typer.Argument(help="Folder of the published system: config.json and weights.")],
    out: Annotated[Path, typer.Option(help="New folder that from_pretrained opens.")],
    vision_num_patches: Annotated[int | None, typer.Option(help="Patches of its features, where config.json does not say.")] = None,
    vision_dim: Annotated[int | None, typer.Option(help="Width of its features; default: read off the weights.")] = None,
) -> None:
    """Turn a checkpoint of the published system into a model that from_pretrained opens."""
    with explained():
        from mmcot.models.checkpoint_import import import_checkpoint

        done = import_checkpoint(source, out, vision_num_patches=vision_num_patches, vision_dim=vision_dim)
        typer.echo(f"{done.path}: {done.num_parameters:,} parameters, features [{done.vision_num_patches}, {done.vision_dim}]")
        if not done.copied_files:
            typer.echo("note: the source has no tokenizer; put one beside the model before using it")


@train_app.command("rationale")
def train_rationale(preset: Preset = None, config: Config = None, set_: Set = [], write_job: WriteJob = None) -> None:  # noqa: B006
    """Train stage one, which writes the rationale."""
    _run_until("train-rationale", preset, config, set_, write_job)


@train_app.command("answer")
def train_answer(preset: Preset = None, config: Config = None, set_: Set = [], write_job: WriteJob = None) -> None:  # noqa: B006
    """Train stage two, which reads the rationale and answers, and whatever must come before."""
    _run_until("train-answer", preset, config, set_, write_job)


@app.command()
def predict(
    model: Annotated[Path, typer.Option(help="The folder of a finished run, such as runs/demo.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    choice: Annotated[list[str], typer.Option(help="One of its choices; repeat for each.")] = [],  # noqa: B006
    context: Annotated[str, typer.Option(help="Text that belongs to the question.")] = "",
    image: Annotated[list[Path], typer.Option(help="A picture; repeat for several.")] = [],  # noqa: B006
    input: Annotated[Path | None, typer.Option(help="A .jsonl or .csv of questions, instead of one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the answers to --input; default: the screen.")] = None,
) -> None:
    """Answer one question, or many, with a finished run: the reasons first, then the answer."""
    with explained():
        if (question is None) == (input is None):
            raise ValueError("give either --question with two or more --choice, or --input FILE.jsonl")
        if input is not None:
            _predict_many(model, input, output)
            return
        from mmcot.texts.problem import Problem

        problem = Problem(qid="question", question=question, choices=tuple(choice), hint=context, images=tuple(map(str, image)))
        from launcher.generation.predictor import RunPredictor, format_answer

        predictor = RunPredictor(model)
        typer.echo(format_answer(next(predictor.answer([problem], Path()))))
        _tell_cut(predictor.num_cut)


@config_app.command("show")
def config_show(preset: Preset = None, config: Config = None, set_: Set = []) -> None:  # noqa: B006
    """Print the resolved settings, every default included."""
    with explained():
        from launcher.config.loading import dump_settings, load_settings, preset_names

        if preset is None and config is None:
            typer.echo(f"presets: {', '.join(preset_names())}  (show one with --preset NAME)")
        else:
            typer.echo(dump_settings(load_settings(preset=preset, config=config, overrides=set_)), nl=False)


@mlflow_app.command("up")
def mlflow_up(
    runs: Annotated[Path, typer.Option(help="The folder that holds the runs, and mlflow.db and mlartifacts beside them.")] = Path("runs"),
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback only with --auth.")] = "127.0.0.1",
    backend_store_uri: Annotated[str | None, typer.Option(help="Database instead of mlflow.db; with a password: by MLFLOW_BACKEND_STORE_URI[_FILE].")] = None,
    artifacts: Annotated[str | None, typer.Option(help="Folder or s3:// URL instead of mlartifacts; clients need no access to it.")] = None,
    auth: Annotated[bool, typer.Option("--auth", help="Ask for name and password; the first: MLFLOW_AUTH_ADMIN_USERNAME, _PASSWORD[_FILE].")] = False,
    workers: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    allowed_hosts: Annotated[str | None, typer.Option(help="Names clients use for this server, comma-separated; default: its own names.")] = None,
) -> None:
    """Serve the runs of a folder, or a team's, until Ctrl-C."""
    with explained():
        import os

        from launcher.tracking.server import plan_server, serve

        server = plan_server(
            runs=runs, environment=dict(os.environ), port=port, host=host, backend_store_uri=backend_store_uri,
            artifacts=artifacts, auth=auth, workers=workers, allowed_hosts=allowed_hosts,
        )  # fmt: skip
        serve(server, report=say)


@app.command()
def status(folder: RunFolder) -> None:
    """Say what a run has done, what it is doing and where it lies in MLflow."""
    with explained():
        from launcher.runs.status import describe_run

        for line in describe_run(folder):
            typer.echo(line)


@app.command()
def sync(folder: RunFolder, uri: Annotated[str | None, typer.Option(help="MLflow; default: the run's own.")] = None) -> None:
    """Send whatever MLflow has not got of a run, such as after it was away; nothing comes twice."""
    with explained():
        from data_shards.atomic_files import read_json
        from launcher.runs.run_dir import RunDir, RunError, owner, settings_of

        run_dir = RunDir(folder)
        settings = settings_of(run_dir)
        told = read_json(run_dir.mlflow_state).get("uri") if run_dir.mlflow_state.exists() else None
        uri = uri or settings.tracking.uri or told  # the one that has the rest, whatever this shell's environment says
        if current := owner(run_dir):
            raise RunError(f"{folder} is being run by process {current['pid']} on {current['host']}, which sends by itself")
        if uri:
            settings = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": uri})})
        from launcher.config.loading import tracking_uri
        from launcher.tracking.mlflow_sync import sync_run

        typer.echo(f"{sync_run(run_dir, settings):,} values sent to {tracking_uri(settings)}")


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folder of a run, finished or not; of several: a comparison.")],
    out: Annotated[Path | None, typer.Option(help="File to write; default RUN/report.html, or report.html for several.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="Pictures embedded of each split, wrong answers first; more where they are tiny.")] = 200,
    looking: Annotated[int, typer.Option(min=0, help="Questions whose attention is measured, wrong answers first.")] = 24,
) -> None:
    """Write a page to look at: scores, curves, questions, and where the model looked. One file, no network."""
    with explained():
        from launcher.report.render import write_report

        target = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
        path = write_report(folders, target, num_pictures=pictures, num_looked_at=looking)
        typer.echo(f"{path}: {path.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _predict_many(model: Path, input: Path, output: Path | None) -> None:
    from data_shards.atomic_files import commit_bytes
    from launcher.generation.predictor import RunPredictor, read_input, to_json_line

    if not input.is_file():
        raise FileNotFoundError(f"--input {input} does not exist; give a .jsonl or .csv file of questions")
    predictor, lines = RunPredictor(model), []
    for problems in read_input(input):
        for prediction in predictor.answer(problems, input.parent):
            if output is None:
                typer.echo(to_json_line(prediction))
            lines.append(to_json_line(prediction))
    if output is not None:
        commit_bytes(output, "".join(f"{line}\n" for line in lines).encode())
        typer.echo(f"{len(lines):,} answers in {output}")
    _tell_cut(predictor.num_cut)


def _tell_cut(num_cut: int) -> None:
    if num_cut:
        typer.echo(f"note: {num_cut:,} prompts were cut at the model's length limit", err=True)


def _run_until(step: str, preset: str | None, config: Path | None, overrides: list[str], write_job: Path | None = None) -> None:
    with explained():
        from launcher.config.loading import load_settings

        settings = load_settings(preset=preset, config=config, overrides=overrides)
        from launcher.pipeline.pipeline import run_pipeline
        from launcher.runs.status import describe_end

        run_dir = run_pipeline(settings, until=step, report=say, write_job=write_job)
        for line in describe_end(settings, run_dir):
            say(line)
