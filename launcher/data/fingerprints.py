"""The inputs that determine the content of a data folder: ``inputs.json`` of the texts and of each feature."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, fingerprint, read_json, sha256_of_file
from data_shards.manifest import SCHEMA_VERSION, read_manifest
from data_shards.sources.folder_files import split_of
from data_shards.sources.forms import form_of
from data_shards.sources.question_set import SPLITS, Picture
from data_shards.sources.table_rows import SUFFIXES
from launcher.config.chains import ANSWER, CHAINS
from launcher.config.settings import Data, Settings, SettingsError
from launcher.data.hub_source import commit_of
from launcher.data.published_features import makes_features, name_map, ready_made_file
from launcher.data.remembered_hashes import sha256_of_files
from mmcot.vision.encoder_kinds import ENCODERS


def folder_inputs(settings: Settings, source: Path) -> dict[str, Any]:
    """The inputs that determine the content of the text shards and the tokenizer.

    Raises:
        SettingsError: the form of the data set names no file.
    """
    data, form = settings.data, form_of(source)
    if not (files := form.content_files(source)):
        raise SettingsError(
            f"{source}: content_files of its form ({form.label}) names no file; expected those that determine the "
            "texts, so that a change of them is noticed"
        )
    if data.captions and not os.path.isfile(data.captions):
        raise SettingsError(f"data.captions {data.captions} does not exist; give a captions.json, or leave it out")
    hashes = sha256_of_files(files, data.cache_dir, name=source)
    return {
        "schema_version": SCHEMA_VERSION,
        "files": {_name_in(source, file): sha256 for file, sha256 in hashes.items()},
        **({"commit": commit} if (commit := commit_of(source)) else {}),
        **({"captions": sha256_of_file(Path(data.captions))} if data.captions else {}),
        **({"splits": data.splits} if data.splits else {}),
        **({"columns": data.columns} if data.columns else {}),
        **({"unanswered": data.unanswered} if data.unanswered != "refuse" else {}),
        "samples_per_shard": data.samples_per_shard,
        "tokenizer_vocab_size": data.tokenizer_vocab_size,
        "tokenizer_formats": None if settings.model.pretrained else tokenizer_formats(settings),
    }


def _name_in(source: Path, file: Path) -> str:
    name = _relative_name(source, file)
    if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise SettingsError(f"the name of the file {name!a} is no UTF-8; rename it")
    return name


def _relative_name(source: Path, file: Path) -> str:
    if file == source:
        return file.name
    return str(file.relative_to(source) if file.is_relative_to(source) else file)


def _feature_inputs(data: Data, source: Path, stored: dict[str, Any] | None) -> dict[str, Any]:
    """The inputs that determine the content of a feature's shards, in addition to the text.

    Args:
        stored: those of the feature as it was built. Earlier versions knew pictures by name and size, and a published
            file by its modification time; what they stored is compared in their way.
    """
    if not makes_features(data):
        earlier = isinstance(made_of := (stored or {}).get("ready_made"), list)
        return {"ready_made": _published_facts_of_0_1(data) if earlier and made_of else _published_facts(data)}
    encoder = ENCODERS[data.require_features()]
    model = data.patch_sizes if encoder.in_driver else data.vision_model or encoder.default_model
    name = "pictures" if stored is not None and "pictures" in stored else "picture_contents"
    return {
        name: _pictures_fingerprint(data, source, by_content=name == "picture_contents"),
        "max_pictures": data.max_pictures,
        "unreadable_pictures": data.unreadable_pictures,
        **({"encoder": model} if model else {}),
    }


def _pictures_fingerprint(data: Data, source: Path, *, by_content: bool) -> str | None:
    """Hash the pictures' names and contents (or sizes); None for a data set whose own files contain the pictures."""
    form = form_of(source)
    if form.holds_pictures:
        return None
    questions = form.questions(source, data.columns)
    named = [
        (problem.qid, picture)
        for split in SPLITS
        for problem in questions.problems[split]
        if problem.qid not in questions.held
        for picture in questions.pictures(problem)
    ]
    if not by_content:
        return fingerprint([[qid, *_name_and_size(picture)] for qid, picture in named])
    files = dict.fromkeys(picture for _, picture in named if isinstance(picture, Path) and os.path.isfile(picture))
    hashes: dict[Picture, str] = {**sha256_of_files(files, data.cache_dir, name=source / "pictures")}
    return fingerprint([[qid, *_name_and_content(picture, hashes)] for qid, picture in named])


def _name_and_content(picture: Picture, hashes: Mapping[Picture, str]) -> tuple[str | None, str | None]:
    if isinstance(picture, bytes):
        return None, hashlib.sha256(picture).hexdigest()
    return picture.name, hashes.get(picture)


def _name_and_size(picture: Picture) -> tuple[str, int | None]:
    if isinstance(picture, bytes):
        return hashlib.sha256(picture).hexdigest(), len(picture)
    return picture.name, picture.stat().st_size if os.path.isfile(picture) else None


def _published_facts(data: Data) -> dict[str, Any] | None:
    """The published file by its content."""
    path, map_path = ready_made_file(data), name_map(data)
    if path is None:
        return None
    hashes = sha256_of_files([path, *([map_path] if map_path.exists() else [])], data.cache_dir, name=path)
    return {"name": path.name, "sha256": hashes[path], "name_map": hashes.get(map_path)}


def _published_facts_of_0_1(data: Data) -> list[Any] | None:
    path, map_path = ready_made_file(data), name_map(data)
    if path is None:
        return None
    status = path.stat()
    return [
        path.name,
        status.st_size,
        status.st_mtime_ns,
        sha256_of_file(map_path) if map_path.exists() else None,
    ]


_READ_IF_THERE = ("captions.json", "ceilings.json")  # of ScienceQA's layout


def claim_folder(data: Data, source: Path, shards_dir: Path, inputs: dict[str, Any]) -> None:
    """Claim the folder for these texts, and its feature for these pictures.

    Raises:
        PicturesChangedError: the feature was made of other pictures.
        SettingsError: the folder has the shards of another data set.
    """
    if (shards_dir / "text" / "manifest.json").exists() and not (shards_dir / "inputs.json").exists():
        raise SettingsError(
            f"{shards_dir} holds shards of unknown origin (no inputs.json); set data.shards_dir to another folder"
        )
    _claim(shards_dir, _like_earlier(shards_dir, inputs))
    if data.features:
        folder = shards_dir / "features" / data.features
        supplied = (folder / "manifest.json").exists() and not (folder / "inputs.json").exists()
        if not supplied:
            stored = _stored(folder)
            inputs = _feature_inputs(data, source, stored)
            _claim(folder, _keep_policy(folder, inputs, stored))
            if (folder / "manifest.json").exists():
                return
            if stored and stored.get("unreadable_pictures") != inputs.get("unreadable_pictures"):
                commit_json(folder / "inputs.json", inputs)  # for the shards that are still missing


def _keep_policy(folder: Path, inputs: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    """The inputs with the stored policy on unreadable pictures, where what stands is the same under the present one.

    Shards that were committed under "fail" have no such picture.
    """
    kept, now = (stored or {}).get("unreadable_pictures"), inputs.get("unreadable_pictures")
    same = kept == "fail" and now == "count"
    if kept == "count" and now == "fail" and (folder / "manifest.json").exists():
        counts = read_manifest(folder)["counts"].values()
        same = not any(count["num_pictures_unreadable"] for count in counts)
    return {**inputs, "unreadable_pictures": kept} if same else inputs


def _like_earlier(folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs as an earlier version stored them, which also listed files of the folder that are not read."""
    known = (_stored(folder) or {}).get("files")
    files = inputs["files"]
    if isinstance(known, dict) and files.items() <= known.items():
        others = (Path(str(name)) for name in known.keys() - files.keys())
        if not any(split_of(other, SUFFIXES) or other.name in _READ_IF_THERE for other in others):
            return {**inputs, "files": known}
    return inputs


def _stored(folder: Path) -> dict[str, Any] | None:
    path = folder / "inputs.json"
    content = read_json(path) if path.exists() else None
    return content if isinstance(content, dict) else None


class PicturesChangedError(SettingsError):
    """A feature was made of other pictures than the data set has now."""


def _claim(folder: Path, inputs: dict[str, Any]) -> None:
    """Write a folder's inputs, or verify that they are the same."""
    path = folder / "inputs.json"
    if not path.exists():
        commit_json(path, inputs)
    elif (stored := read_json(path)) != inputs:
        if not isinstance(stored, dict):
            raise SettingsError(
                f"{path} holds {str(stored)[:80]!r}, expected an object; restore it, or delete {folder}"
            )
        key = next(key for key in {**inputs, **stored} if stored.get(key) != inputs.get(key))
        if key in ("pictures", "picture_contents"):
            raise PicturesChangedError(
                f"{folder} was made of other pictures than the data set has now; `mmcot data shard` with the same "
                "settings makes it again of these, or restore the pictures, or give these a folder of their own with "
                "--set data.shards_dir=FOLDER"
            )
        raise SettingsError(
            f"{folder} holds the shards of another data set ({key} was {stored.get(key)!r} and is now "
            f"{inputs.get(key)!r}); give these a folder of their own with --set data.shards_dir=FOLDER, or delete it "
            "if no run needs it"
        )


def tokenizer_formats(settings: Settings) -> list[str]:
    """The prompt formats of the tokenizer's corpus; those of two stages for all chains, which so share a folder."""
    two_stage = CHAINS["two-stage"]
    if settings.chain.stage_names not in (two_stage.stage_names, two_stage.stage_names[1:]):
        return [settings.stage(name).format for name in settings.chain.stage_names]
    reads = settings.chain.reads_rationales
    answer = settings.stage(ANSWER).format if reads else two_stage.stage(ANSWER).format
    return [settings.gold_format(None), answer]
