"""The commands that use models and predictions: evaluate, predict, reference, import-checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import (
    AllowExtensions,
    Config,
    Preset,
    Set,
    allow,
    errors_as_messages,
    say,
)
from launcher.cli.running import run_until
from mmcot.errors import InputError, MissingFileError

models_app = typer.Typer()


@models_app.command()
def evaluate(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The folder of a finished run, to answer and score --split.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    set_: Set = [],
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file instead: ours, the published system's, or ScienceQA's.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The data set of the file.")] = None,
    split: Annotated[str, typer.Option(help="The split of RUN or of the file: train, val or test.")] = "test",
    against: Annotated[str | None, typer.Option(help="'paper' also prints the published rows.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the content of a scores.json.")] = False,
    rationale_format: Annotated[
        str, typer.Option(help="Prompt format of the gold rationales to compare with.")
    ] = "QCM-E",
    similarity_model: Annotated[
        str | None, typer.Option(help="Folder of a sentence model, for the similarity score.")
    ] = None,
    guess_seed: Annotated[
        int | None, typer.Option(help="Guess unreadable answers, as the published system does.")
    ] = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Answer and score with a finished RUN; or run the pipeline up to its scores; or score a file of predictions."""
    if folder is not None:
        with errors_as_messages():
            if preset or config or predictions or against or similarity_model or data or guess_seed is not None:
                raise InputError(
                    "RUN goes with --split, --set, --json and --allow-extensions alone; for the other options give "
                    "--preset or --config, or --predictions"
                )
            allow([folder], allow_extensions)
            from launcher.cli.console import open_console

            with open_console() as console:
                from launcher.pipeline.pipeline import evaluate_run

                report = (lambda line: None) if as_json else console
                results = evaluate_run(folder, split, overrides=set_, report=report)
            scores = (results / "scores.json").read_text(encoding="utf-8")
            typer.echo(scores if as_json else f"\nevaluation: {results}")
        return
    if predictions is None:
        run_until("evaluate", preset, config, set_)
        return
    with errors_as_messages():
        if data is None or split not in ("train", "val", "test") or against not in (None, "paper"):
            raise InputError(
                "--predictions needs --data DIR, a --split of train, val or test, and --against paper or nothing"
            )
        from launcher.evaluation.external_predictions import format_scores, score_file

        scored = score_file(
            predictions,
            data,
            split=split,
            rationale_format=rationale_format,
            similarity_model=similarity_model,
            guess_seed=guess_seed,
        )
        if as_json:
            typer.echo(json.dumps(scored.report, indent=2))
            return
        for line in format_scores(scored, path=predictions, against_paper=against == "paper"):
            typer.echo(line)


@models_app.command("reference", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def reference_command(context: typer.Context, set_: Set = []) -> None:
    """Run a command of the published system as typed: mmcot reference -- <options of its main.py>."""
    with errors_as_messages():
        from launcher.cli.console import open_console
        from launcher.compat.published_commands import num_gpus, parse_command
        from launcher.compat.published_runs import run_reference

        run = parse_command(context.args, num_gpus=num_gpus(), overrides=set_)
        with open_console() as console:
            written = run_reference(run, report=console)
        typer.echo(f"\n{written}")


@models_app.command("import-checkpoint")
def import_checkpoint(
    source: Annotated[
        Path, typer.Argument(help="Folder of a checkpoint of the published system: config.json and weights.")
    ],
    out: Annotated[Path, typer.Option(help="New folder that from_pretrained opens.")],
    vision_num_patches: Annotated[
        int | None, typer.Option(help="Patches of its features, if config.json does not contain the number.")
    ] = None,
    vision_dim: Annotated[
        int | None, typer.Option(help="Width of its features; default: read from the weights.")
    ] = None,
) -> None:
    """Turn a checkpoint of the published system into a model that from_pretrained opens."""
    with errors_as_messages():
        from mmcot.models.checkpoint_import import import_checkpoint

        done = import_checkpoint(source, out, vision_num_patches=vision_num_patches, vision_dim=vision_dim)
        typer.echo(
            f"{done.path}: {done.num_parameters:,} parameters, features [{done.vision_num_patches}, {done.vision_dim}]"
        )
        if not done.copied_files:
            typer.echo("note: the source has no tokenizer; put one into the model's folder before using it")


@models_app.command()
def predict(
    model: Annotated[Path, typer.Option(help="The folder of a finished run, such as runs/demo.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    choice: Annotated[list[str], typer.Option(help="One of its choices; repeat for each. None: a free answer.")] = [],
    context: Annotated[str, typer.Option(help="Text that belongs to the question.")] = "",
    image: Annotated[list[Path], typer.Option(help="A picture; repeat for several.")] = [],
    input: Annotated[Path | None, typer.Option(help="A .jsonl or .csv of questions, instead of one.")] = None,
    output: Annotated[Path | None, typer.Option(help="File for the answers to --input; default: the console.")] = None,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Answer one question, or many, with a finished run: the rationale, then the answer. Or describe a picture."""
    with errors_as_messages():
        allow([model], allow_extensions)
        if input is not None and question is None:
            _predict_many(model, input, output)
            return
        if input is not None or (question is None and not image):
            raise InputError(
                "give either --question with two or more --choice (none for a free answer), or --image alone for a "
                "text about it, or --input FILE.jsonl"
            )
        from mmcot.texts.answers import parse_answer
        from mmcot.texts.sample import MAX_CHOICES, Sample

        is_free = question is not None and not choice
        problem = Sample(
            qid="1",
            question=question or "",
            choices=tuple(choice),
            answers=() if is_free else None,
            text="" if question is None and not choice else None,
            hint=context,
            images=tuple(map(str, image)),
        )
        _say_opening()
        from launcher.generation.predictor import RunPredictor, format_answer

        predictor = RunPredictor(model)
        if is_free and predictor.answers_with_letters:
            raise InputError(f"{model} was trained on questions with choices; give those of this one with --choice")
        prediction = next(predictor.answer([problem], Path()))
        typer.echo(format_answer(prediction))
        if not image and predictor.settings.data.features is not None:
            say(
                "note: answered without a picture; this run was trained with pictures (--image)",
                err=True,
            )
        if is_free and parse_answer(prediction["answer_text"], MAX_CHOICES) is not None:
            say("note: the model answers with the letter of a choice; give the choices with --choice", err=True)
        _report_cut(predictor.num_cut)


def _predict_many(model: Path, input: Path, output: Path | None) -> None:
    from data_shards.atomic_files import commit_bytes

    if not input.is_file():
        raise MissingFileError(f"--input {input} does not exist; give a .jsonl or .csv file of questions")
    _say_opening()
    from launcher.generation.predictor import RunPredictor, read_input, to_json_line

    predictor, lines = RunPredictor(model), []
    for problems in read_input(input):
        for prediction in predictor.answer(problems, input.parent):
            if output is None:
                typer.echo(to_json_line(prediction))
            lines.append(to_json_line(prediction))
    if output is not None:
        commit_bytes(output, "".join(f"{line}\n" for line in lines).encode())
        typer.echo(f"{len(lines):,} answers in {output}")
    _report_cut(predictor.num_cut)


def _say_opening() -> None:
    """Say on a terminal why nothing happens for some seconds; in a pipe errors alone go to stderr."""
    if sys.stderr.isatty():
        say("  opening the models", err=True)


def _report_cut(num_cut: int) -> None:
    if num_cut:
        typer.echo(f"note: {num_cut:,} prompts were cut at the model's length limit", err=True)
