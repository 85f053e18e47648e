"""The commands ``mmcot data``. Each command imports heavy libraries only when it runs."""

from __future__ import annotations

import glob
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from data_shards.sources.forms import form_labels
from launcher.cli.options import (
    AllowExtensions,
    Column,
    Config,
    Preset,
    RunFolder,
    Set,
    allow,
    columns_of,
    errors_as_messages,
    say,
)
from mmcot.errors import InputError, MissingFileError

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; of a data set with faults, the faults.")]

data_app = typer.Typer(help="Make, shard and check data.", no_args_is_help=True)


@data_app.command("make")
def data_make(
    output: Annotated[Path, typer.Argument(help="Folder to write, in ScienceQA's layout.")],
    num_train: Annotated[int, typer.Option(help="Training questions.")] = 4000,
    num_val: Annotated[int, typer.Option(help="Validation questions.")] = 400,
    num_test: Annotated[int, typer.Option(help="Test questions.")] = 800,
    seed: Annotated[int, typer.Option(help="Seed of the generator.")] = 0,
    shuffle_choices: Annotated[
        bool,
        typer.Option("--shuffle-choices/--fixed-choices", help="Shuffle the choices of each question."),
    ] = True,
    extra_choices: Annotated[
        int,
        typer.Option(help="Maximum number of choices from other skills, in addition to the skill's own.", min=0, max=3),
    ] = 1,
    form: Annotated[str, typer.Option(help="choices, free (answers), captions or episodes.")] = "choices",
    skill: Annotated[list[str] | None, typer.Option(help="A skill to draw, repeatable; none: all.")] = None,
    telling_captions: Annotated[bool, typer.Option(help="Every caption states the picture's fact.")] = False,
) -> None:
    """Write MiniSQA, the embedded data set."""
    from data_shards.mini_sqa.generate import write_mini_sqa

    with errors_as_messages():
        write_mini_sqa(
            output,
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            seed=seed,
            shuffle_choices=shuffle_choices,
            extra_choices=extra_choices,
            form=form,
            skills=skill,
            telling_captions=telling_captions,
        )
        typer.echo(f"{output}: {num_train:,} train, {num_val:,} val, {num_test:,} test questions")


@data_app.command("template")
def data_template(
    form: Annotated[str, typer.Argument(help="csv or jsonl.")],
    out: Annotated[Path | None, typer.Option(help="The file to write, a new one; else it is printed.")] = None,
) -> None:
    """Write a small filled table to begin a data set with; it can be described and sharded as it is."""
    with errors_as_messages():
        from launcher.data.template import template_text, write_template

        if out is None:
            typer.echo(template_text(form), nl=False)
            return
        write_template(form, out)
        typer.echo(f"{out}: 12 questions; next: mmcot data describe {shlex.quote(str(out))}")


@data_app.command("shard")
def data_shard(preset: Preset = None, config: Config = None, set_: Set = [], as_json: AsJson = False) -> None:
    """Build text and feature shards, their indexes and the tokenizer."""
    with errors_as_messages(as_json=as_json):
        from launcher.cli.console import open_console
        from launcher.config.loading import load_settings
        from launcher.data.build import describe_data, prepare_data
        from launcher.pipeline.preflight import check_settings
        from launcher.runs.signals import sigterm_stops

        settings = load_settings(preset=preset, config=config, overrides=set_)
        check_settings(settings)
        with sigterm_stops(), open_console() as console:
            notes: list[str] = []
            folder = prepare_data(settings, notes.append if as_json else console)
        if as_json:
            facts = {"path": str(folder.path), "num_samples": folder.text["num_samples"], "notes": notes}
            typer.echo(json.dumps(facts, indent=2))
            return
        for line in describe_data(folder):
            say(line)


@data_app.command("caption")
def data_caption(
    path: Annotated[str, typer.Argument(help="A data set with pictures, in any of the known forms.")],
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face id or folder of a captioning model, such as Salesforce/blip-image-captioning-base."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The captions.json to write; use it with --set data.captions=FILE.")],
    set_: Set = [],
) -> None:
    """Write captions of all pictures with a local model, on Ray workers. Run again to resume."""
    with errors_as_messages():
        from launcher.cli.console import open_console
        from launcher.data.caption_tasks import write_captions
        from launcher.data.dataset import local_path

        with open_console() as console:
            write_captions(local_path(path, console), model, out, overrides=set_, report=console)


@data_app.command("index")
def data_index(
    tars: Annotated[
        list[str],
        typer.Argument(help="Tars by split: train=FILE or train='FOLDER/a-*.tar', paths or URLs; val=..., test=..."),
    ],
    out: Annotated[Path, typer.Option(help="Data folder to write: indexes and manifests, no copies.")],
    features: Annotated[str | None, typer.Option(help="Name under which .npy members become vision features.")] = None,
    as_json: AsJson = False,
) -> None:
    """Index existing webdataset tars in place; then run with --set data.shards_dir=OUT."""
    with errors_as_messages(as_json=as_json):
        from data_shards.indexed_tars import index_tars
        from launcher.cli.console import open_console

        with open_console() as console:
            notes: list[str] = []
            report = notes.append if as_json else console
            manifest = index_tars(_tars_by_split(tars), out, features=features, report=report)
        if as_json:
            typer.echo(json.dumps({"path": str(out), "num_samples": manifest["num_samples"], "notes": notes}))
            return
        counts = ", ".join(f"{number:,} {split}" for split, number in manifest["num_samples"].items())
        typer.echo(f"{out}: {counts} questions in {len(manifest['shards'])} tars")


@data_app.command("check")
def data_check(
    shards: Annotated[str, typer.Argument(help="A data folder, or its URL.")],
    features: Annotated[
        str | None, typer.Option(help="Features to check of a folder behind a URL; locally all are checked.")
    ] = None,
) -> None:
    """Verify every shard by its manifest: size, checksum, index, order of keys; find repeated questions."""
    with errors_as_messages():
        from launcher.cli.console import open_console
        from launcher.data.check import check_data

        with open_console() as console:
            num_samples = check_data(shards, console, features=features)
        typer.echo(f"{num_samples:,} samples in order")


@data_app.command("ledger")
def data_ledger(folder: RunFolder, allow_extensions: AllowExtensions = False) -> None:
    """Verify that each epoch of a run used each training question exactly once."""
    with errors_as_messages():
        allow([folder], allow_extensions)
        from data_shards.mirror import local_folder
        from data_shards.reader import SplitReader
        from launcher.config.settings import Data
        from launcher.runs.run_dir import RunDir, shards_dir_of
        from launcher.runs.run_settings import read_run_settings
        from launcher.runs.sample_ledger import verify_ledger

        run_dir = RunDir(folder)
        names = read_run_settings(run_dir.path).chain.stage_names
        folder = local_folder(shards_dir_of(run_dir), Data.model_validate({}).cache_dir, features=None)
        qids = [str(qid) for qid in SplitReader(folder, "train").qids]
        stages = [stage for stage in names if list(run_dir.logs.glob(f"{stage}-ledger-*"))]
        for stage in stages or names[:1]:
            for line in verify_ledger(run_dir, stage, qids):
                typer.echo(line)


@data_app.command("describe")
def data_describe(
    path: Annotated[str, typer.Argument(help=f"A data set: {form_labels()}, or hf://org/name.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder to count tokens with; else words.")
    ] = None,
    column: Column = [],
    extension: Annotated[
        list[str] | None, typer.Option(help="A module with forms of data (docs/extending.md); repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Count questions, pictures and contexts, and how long prompts are, before building anything."""
    with errors_as_messages(as_json=as_json):
        from launcher.config.extensions import load_extensions

        load_extensions(extension or [])
        from launcher.data.dataset import local_path
        from launcher.data.describe import describe_questions, description_lines

        source = local_path(path, (lambda line: None) if as_json else say)
        facts = describe_questions(source, tokenizer=tokenizer, columns=columns_of(column))
        for line in [json.dumps(facts, indent=2)] if as_json else description_lines(facts):
            typer.echo(line)


def _tars_by_split(arguments: list[str]) -> dict[str, list[Path | str]]:
    from data_shards.remote_files import is_remote, list_urls

    tars: dict[str, list[Path | str]] = {}
    for argument in arguments:
        split, equals, pattern = argument.partition("=")
        if not equals or split not in ("train", "val", "test"):
            raise InputError(f"{argument!r} must be train=FILE, val=FILE or test=FILE")
        names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))  # a name may contain brackets
        found = list_urls(pattern) if is_remote(pattern) else [Path(name) for name in names]
        if not found:
            raise MissingFileError(f"{pattern} matches no file; give the path of a tar, or a pattern in quotes")
        tars.setdefault(split, []).extend(found)
    return tars
