"""The commands that use models and predictions: evaluate, predict, reference, import-checkpoint."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.options import (
    AllowExtensions,
    Column,
    Config,
    Preset,
    Set,
    allow,
    columns_of,
    errors_as_messages,
    printable,
    say,
)
from launcher.cli.running import run_until
from mmcot.errors import InputError

if TYPE_CHECKING:
    from mmcot.models.checkpoint_import import ImportedCheckpoint

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
    data: Annotated[str | None, typer.Option(help="The data set of the file, or hf://org/name.")] = None,
    column: Column = [],
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
            if (
                preset
                or config
                or predictions
                or against
                or similarity_model
                or data
                or column
                or guess_seed is not None
            ):
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
        from launcher.data.dataset import local_path
        from launcher.evaluation.external_predictions import format_scores, score_file

        scored = score_file(
            predictions,
            local_path(data, lambda line: say(line, err=True)),
            split=split,
            columns=columns_of(column),
            rationale_format=rationale_format,
            similarity_model=similarity_model,
            guess_seed=guess_seed,
        )
        if as_json:
            typer.echo(json.dumps(scored.report, indent=2))
            for line in scored.left_out:
                say(line, err=True)
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
        Path,
        typer.Argument(
            help="Folder of a Multimodal-CoT, a BLIP-2 with a T5 or an IDEFICS: config.json and weights; or "
            "OpenFlamingo's checkpoint.pt."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder that from_pretrained and model.pretrained open.")],
    vision_num_patches: Annotated[
        int | None, typer.Option(help="Patches of its features, if config.json does not contain the number.")
    ] = None,
    vision_dim: Annotated[
        int | None, typer.Option(help="Width of its features; default: read from the weights.")
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(help="A T5, folder or id, beside which the resampler of IDEFICS or OpenFlamingo is put."),
    ] = None,
) -> None:
    """Turn a published checkpoint into a model that from_pretrained opens."""
    with errors_as_messages():
        from mmcot.models.checkpoint_import import import_checkpoint

        done = import_checkpoint(
            source,
            out,
            vision_num_patches=vision_num_patches,
            vision_dim=vision_dim,
            language_model=language_model,
        )
        typer.echo(
            f"{done.path}: {done.num_parameters:,} parameters, features [{done.vision_num_patches}, {done.vision_dim}]"
        )
        if not done.copied_files:
            typer.echo("note: the source has no tokenizer; put one into the model's folder before using it")
        if done.features:
            typer.echo("note: its vision model makes the features before training and is not in the folder")
        if language_model:
            typer.echo("note: its resampler alone was read; the linear layer from it to the T5 is new")
        if done.media:
            typer.echo(f"to train it: {_to_train(done, source)}")


def _to_train(done: ImportedCheckpoint, source: Path) -> str:
    """The options of a training that starts from an imported model."""
    media = {f"model.{name}": str(value).lower() for name, value in done.media.items() if value is not None}
    features = {"data.features": done.features, "data.vision_model": str(source)} if done.features else {}
    values = {"model.pretrained": str(done.path)} | media | features
    return " ".join(f"--set {name}={shlex.quote(value)}" for name, value in values.items())


@models_app.command()
def predict(
    model: Annotated[Path, typer.Option(help="The folder of a finished run, such as runs/demo.")],
    question: Annotated[str | None, typer.Option(help="A question.")] = None,
    choice: Annotated[list[str], typer.Option(help="One of its choices; repeat for each. None: a free answer.")] = [],
    context: Annotated[str, typer.Option(help="Text that belongs to the question.")] = "",
    image: Annotated[list[Path], typer.Option(help="A picture; repeat for several.")] = [],
    input: Annotated[Path | None, typer.Option(help="A .jsonl or .csv of questions, instead of one.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A .jsonl or .csv for the answers to --input, which the same command continues."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Answer no row of --input if one of them has a fault.")
    ] = False,
    allow_extensions: AllowExtensions = False,
) -> None:
    """Answer one question, or many, with a finished run: the rationale, then the answer. Or describe a picture."""
    with errors_as_messages():
        _require_texts({"--question": [question or ""], "--choice": choice, "--context": [context], "--image": image})
        if input is not None and (question is not None or choice or context or image):
            raise InputError(
                "--input goes with --output and --strict alone; leave out --question, --choice, --context and --image, "
                "or --input"
            )
        allow([model], allow_extensions)
        if input is not None:
            _predict_many(model, input, output, strict=strict)
            return
        if question is None and not image:
            raise InputError(
                "give either --question with two or more --choice (none for a free answer), or --image alone for a "
                "text about it, or --input FILE.jsonl"
            )
        if output is not None or strict:
            raise InputError("--output and --strict go with --input FILE; one answer is printed to the console")
        _predict_one(model, question, choice, context, image)


def _require_texts(given: dict[str, Sequence[str | Path]]) -> None:
    """Refuse arguments whose bytes are no text: Python has halves of UTF-16 pairs in their place."""
    for name, values in given.items():
        for value in map(str, values):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{name} is '{printable(value)}', whose bytes are no UTF-8; type it in a terminal of UTF-8"
                    + (", or rename the file" if name == "--image" else "")
                ) from None


def _predict_one(model: Path, question: str | None, choices: list[str], context: str, images: list[Path]) -> None:
    from mmcot.texts.answers import parse_answer
    from mmcot.texts.sample import MAX_CHOICES, Sample

    is_free = question is not None and not choices
    problem = Sample(
        qid="1",
        question=question or "",
        choices=tuple(choices),
        answers=() if is_free else None,
        text="" if question is None and not choices else None,
        hint=context,
        images=tuple(map(str, images)),
    )
    _say_opening()
    from launcher.generation.predictor import RunPredictor, format_answer

    predictor = RunPredictor(model)
    if is_free and predictor.answers_with_letters:
        raise InputError(f"{model} was trained on questions with choices; give those of this one with --choice")
    prediction = next(predictor.answer([problem], Path()))
    typer.echo(format_answer(prediction))
    if not images and predictor.settings.data.features is not None:
        say(
            "note: answered without a picture; this run was trained with pictures (--image)",
            err=True,
        )
    if is_free and parse_answer(prediction["answer_text"], MAX_CHOICES) is not None:
        say("note: the model answers with the letter of a choice; give the choices with --choice", err=True)
    _report_cut(predictor.num_cut)


def _predict_many(model: Path, input: Path, output: Path | None, *, strict: bool) -> None:
    from launcher.cli.answer_progress import AnswerProgress

    _say_opening()
    from launcher.generation.predict_file import predict_file
    from launcher.generation.predictor import RunPredictor, to_json_line

    progress = AnswerProgress()
    predictor = RunPredictor(model, report=progress.say)
    done = predict_file(
        predictor,
        input,
        output,
        strict=strict,
        show=lambda answer: progress.answer(to_json_line(answer)),
        progress=progress,
    )
    if output is not None:
        say(f"{done.num_rows - done.num_errors:,} answers in {printable(output)}")
    _report_cut(predictor.num_cut)
    if done.num_errors:
        say(f"{done.num_errors:,} of {done.num_rows:,} rows have an error in place of an answer", err=True)
        raise typer.Exit(1)


def _say_opening() -> None:
    """Say on a terminal why nothing happens for some seconds; in a pipe errors alone go to stderr."""
    if sys.stderr.isatty():
        say("  opening the models", err=True)


def _report_cut(num_cut: int) -> None:
    if num_cut:
        typer.echo(f"note: {num_cut:,} prompts were cut at the model's length limit", err=True)
