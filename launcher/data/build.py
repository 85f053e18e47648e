"""The data step: building the shared data folder from a data set.

The folder is outside the run and shared by runs. Its default name contains a fingerprint of
everything that determines its content, so that two data sets never share a folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from data_shards.atomic_files import (
    clear_unfinished,
    commit_folder,
    exclusive,
    fingerprint,
)
from data_shards.leftovers import describe_leftovers, remove_leftovers
from data_shards.manifest import manifest_shards, read_manifest, read_problems
from data_shards.mirror import mirror_folder
from data_shards.remote_files import is_remote
from data_shards.sources.question_set import SPLITS
from data_shards.writer import write_feature_shards, write_text_shards
from launcher.config.settings import Settings, SettingsError
from launcher.data.dataset import read_source, source_folder
from launcher.data.describe import is_question
from launcher.data.feature_tasks import make_features
from launcher.data.fingerprints import PicturesChangedError, claim_folder, folder_inputs, tokenizer_formats
from launcher.data.hub_source import hub_place, is_on_hub
from launcher.data.published_features import makes_features, name_map, open_ready_made
from launcher.runs.progress import Phase
from launcher.stages.data_folder import DataFolder, is_indexed, open_data
from mmcot.texts.prompts import build_pair, split_format

_TROUBLES = {
    "num_picture_absent": "whose picture is absent (used without it)",
    "num_pictures_unreadable": "pictures that could not be read (used without them)",
    "num_pictures_missing": "pictures absent of questions with other pictures (used without them)",
    "num_pictures_over_limit": "pictures beyond data.max_pictures (left out)",
}
Report = Callable[[str], None]


def prepare_data(settings: Settings, report: Report = print, *, to_train: bool = False) -> DataFolder:
    """Build the missing parts of the data folder and return the folder.

    Args:
        to_train: refuse a data set in which a split is empty, before it is built.

    Raises:
        SettingsError: data.shards_dir contains the shards of another data set, or a split is empty.
    """
    folder = _prepare(settings, report, to_train)
    if to_train:
        require_all_splits(folder.text["num_samples"], where=folder.location)
    return folder


def _prepare(settings: Settings, report: Report, to_train: bool) -> DataFolder:
    if settings.data.shards_dir and is_remote(settings.data.shards_dir):
        return _open_remote(settings, settings.data.shards_dir)
    if settings.data.shards_dir and is_indexed(settings.data.shards_dir):
        return _prepare_indexed(settings, Path(settings.data.shards_dir), report)
    source = source_folder(settings.data, report)
    inputs = folder_inputs(settings, source)
    name = _name_of(settings.data.path, source)
    sizes = settings.data.patch_sizes  # squares of other sizes are other features of the same name
    own = f"{name}-{fingerprint(inputs)}" + (f"-{sizes.replace('/', '-')}" if sizes else "")
    shards_dir = Path(settings.data.shards_dir or Path("data") / own)
    try:
        if not _missing(settings, shards_dir):  # no lock, because the folder may be read-only
            claim_folder(settings.data, source, shards_dir, inputs)
            return open_data(settings.data, shards_dir)
    except PicturesChangedError:
        if to_train:  # by a run, which may have read the features
            raise
    with exclusive(shards_dir):
        try:
            claim_folder(settings.data, source, shards_dir, inputs)
        except PicturesChangedError:
            if to_train:
                raise
            report(f"pictures of {source} have changed: the features {settings.data.features} are made again")
            _remove_feature(shards_dir / "features" / settings.data.require_features())
            claim_folder(settings.data, source, shards_dir, inputs)
        _build_missing(settings, source, shards_dir, report, to_train)
    return open_data(settings.data, shards_dir)


def _name_of(path: str | None, source: Path) -> str:
    if path is None:
        return "mini_sqa"
    return hub_place(path).name if is_on_hub(path) else source.stem


def _remove_feature(folder: Path) -> None:
    """Remove a feature; its manifest first, so that a part of it is never taken for the whole."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def standing_mini_sqa(settings: Settings, marker: dict[str, Any] | None) -> DataFolder | None:
    """Return the MiniSQA data folder of a run's finished data step, or None where it is not complete.

    MiniSQA of an earlier version could not be drawn again.
    """
    shards_dir = (marker or {}).get("outputs", {}).get("shards_dir")
    own = settings.data.shards_dir
    if settings.data.path is not None or not shards_dir or is_remote(shards_dir) or is_indexed(shards_dir):
        return None
    if own is not None and (is_remote(own) or Path(own).absolute() != Path(shards_dir)):
        return None
    return None if _missing(settings, Path(shards_dir)) else open_data(settings.data, shards_dir)


def _missing(settings: Settings, shards_dir: Path) -> set[str]:
    """Return the parts of a data folder that are not built yet: "text", "features", "tokenizer"."""
    needed = {"text": shards_dir / "text" / "manifest.json"}
    if settings.data.features:
        needed["features"] = shards_dir / "features" / settings.data.features / "manifest.json"
    if settings.model.pretrained is None:
        needed["tokenizer"] = shards_dir / "tokenizer"
    return {name for name, path in needed.items() if not path.exists()}


def _build_missing(settings: Settings, source: Path, shards_dir: Path, report: Report, to_train: bool) -> None:
    missing = _missing(settings, shards_dir)
    for line in describe_leftovers(*remove_leftovers(shards_dir, staging=True)):
        report(line)
    for folder in (shards_dir / "text", shards_dir / "features" / str(settings.data.features)):
        clear_unfinished(folder)
    if "text" in missing:
        report(Phase(f"  reading {source}"))
        questions = read_source(settings.data, source)
        if to_train:
            require_all_splits({split: len(found) for split, found in questions.problems.items()}, where=source)
        if not any(problem.solution for problem in questions.problems["train"]) and _trains_on_gold_reasons(settings):
            report(
                "note: no training question has a rationale, so a model would learn to write none; for data without "
                "rationales use --set run.chain=answer"
            )
        report(Phase("  writing text shards"))
        text = write_text_shards(questions, shards_dir, samples_per_shard=settings.data.samples_per_shard)
        for note in (*questions.notes, f"text: {_count(text['num_samples'])} in {len(text['shards'])} shards"):
            report(note)
    if "features" in missing:
        _build_features(settings, source, shards_dir, report)
    if "tokenizer" in missing:
        _build_tokenizer(settings, shards_dir, report)


def _trains_on_gold_reasons(settings: Settings) -> bool:
    """Whether a stage learns to write the data's own rationales."""
    formats = [settings.stage(name).format for name in settings.chain.stage_names]
    return any("E" in split_format(format)[1] for format in formats)


def _open_remote(settings: Settings, url: str) -> DataFolder:
    if settings.data.path is not None:
        raise SettingsError(
            f"data.shards_dir {url} is finished, so data.path ({settings.data.path}) would not be read; leave it out"
        )
    shards_dir = mirror_folder(url, settings.data.cache_dir, features=settings.data.features)
    if "tokenizer" in _missing(settings, shards_dir):
        raise SettingsError(
            f"{url} holds no tokenizer; set model.pretrained, or copy a folder there that was built without it"
        )
    return open_data(settings.data, shards_dir)


def _prepare_indexed(settings: Settings, shards_dir: Path, report: Report) -> DataFolder:
    if settings.data.path is not None:
        raise SettingsError(
            f"data.shards_dir {shards_dir} indexes tars, so data.path ({settings.data.path}) would not be read; "
            "leave it out"
        )
    if _missing(settings, shards_dir):
        with exclusive(shards_dir):
            missing = _missing(settings, shards_dir)
            if "features" in missing:
                _build_features(settings, None, shards_dir, report)
            if "tokenizer" in missing:
                _build_tokenizer(settings, shards_dir, report)
    return open_data(settings.data, shards_dir)


def require_all_splits(num_samples: Mapping[str, int], *, where: object) -> None:
    """Raise SettingsError if a split that the pipeline needs has no question."""
    if empty := [split for split in SPLITS if not num_samples.get(split)]:
        raise SettingsError(
            f"{where} has no question in {' and none in '.join(empty)} ({_count(num_samples)}); a run trains on train, "
            "follows the loss on val and takes its scores from test: give each split at least one question, or leave "
            "`split` out of all rows to divide them 80:10:10"
        )


def describe_data(folder: DataFolder) -> list[str]:
    """Describe the folder in human-readable lines, including everything that is missing."""
    lines = [f"data: {folder.path} ({_count(folder.text['num_samples'])})"]
    if not folder.features:
        return lines
    counts = folder.features["counts"]
    for split, count in counts.items():
        parts = [f"{count['num_with_features']:,} questions with one", f"{count['num_no_image']:,} without"]
        parts += [f"{count[name]:,} {text}" for name, text in _TROUBLES.items() if count.get(name)]
        lines.append(f"pictures of {split}: {', '.join(parts)}")
    if not counts["train"]["num_with_features"] and any(count["num_with_features"] for count in counts.values()):
        lines.append("note: no training question has a picture, so the model cannot learn to use those of val and test")
    return lines


def _build_features(settings: Settings, source: Path | None, shards_dir: Path, report: Report) -> None:
    """Build features of a data set's pictures, or of those in indexed tars (``source`` None)."""
    data = settings.data
    report(Phase(f"  writing {data.features} features"))
    if makes_features(data):
        manifest = make_features(settings, source, shards_dir, report)
    else:
        features_of, shape = open_ready_made(data)
        name = data.require_features()
        manifest = write_feature_shards(shards_dir, name=name, features_of=features_of, shape=shape)
        if not _pictures(manifest):
            report(
                f"note: no question has a row in {name_map(data)}; its ids are not those of this data set, or no "
                "question has a picture"
            )
    report(
        f"features {data.features}: {manifest['num_patches']} patches of {manifest['dim']}, {_pictures(manifest):,} "
        "pictures"
    )


def _build_tokenizer(settings: Settings, shards_dir: Path, report: Report) -> None:
    from mmcot.texts.tokenizer import train_tokenizer

    report(Phase("  training a tokenizer"))
    staging = shards_dir / ".staging-tokenizer"
    shutil.rmtree(staging, ignore_errors=True)  # of a killed process
    tokenizer = train_tokenizer(_corpus(settings, shards_dir), staging, vocab_size=settings.data.tokenizer_vocab_size)
    commit_folder(staging, shards_dir / "tokenizer")
    report(f"tokenizer: {len(tokenizer)} pieces, trained on the training split")


def _corpus(settings: Settings, shards_dir: Path) -> Iterable[str]:
    """Sources and targets of all stages on the training split; nothing of val and test."""
    for shard in manifest_shards(read_manifest(shards_dir / "text"), "train"):
        for problem in read_problems(shards_dir / "text", shard):
            for format in tokenizer_formats(settings) if is_question(problem) else ("P-T",):
                yield from build_pair(problem, format, use_caption=True)


def _pictures(features: dict[str, Any]) -> int:
    return sum(count["num_with_features"] for count in features["counts"].values())


def _count(num_samples: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in num_samples.items())
