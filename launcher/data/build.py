"""The data step: from a data set to the shared data folder.

The folder is outside the run and shared by runs; its default name carries a fingerprint
of everything that decides its content, so that two data sets never meet in one.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.sources import hf_dataset
from data_shards.sources.duplicates import find_duplicates
from data_shards.picture_features import FeatureError, FeaturesOf, ready_made_features
from data_shards.sources.question_set import SPLITS
from data_shards.remote_files import is_remote, local_folder, mirror_folder, origin_of
from data_shards.sources.forms import read_questions
from data_shards.atomic_files import clear_unfinished, commit_folder, commit_json, exclusive, fingerprint, read_json, sha256_of_file
from data_shards.writer import (
    SCHEMA_VERSION,
    check_shards,
    manifest_shards,
    read_manifest,
    read_problems,
    write_feature_shards,
    write_text_shards,
)
from launcher.config.chains import CHAINS
from launcher.data.feature_tasks import make_features
from launcher.config.settings import Data, Settings, SettingsError
from launcher.data.dataset import read_source, source_folder
from mmcot.vision.patches import FEATURES, PUBLISHED_SHAPES
from mmcot.vision.encoders import ENCODERS

_TROUBLES = {
    "num_picture_absent": "whose picture is absent (used without it)",
    "num_pictures_unreadable": "pictures that could not be read (used without them)",
    "num_pictures_missing": "pictures absent beside others of their question (used without them)",
    "num_pictures_over_limit": "pictures beyond data.max_pictures (left out)",
}
Report = Callable[[str], None]
_TEXT_SUFFIXES = (".jsonl", ".csv", ".json", ".arrow")


@dataclasses.dataclass(frozen=True)
class DataFolder:
    """A finished data folder: where it is and what it holds.

    ``path`` is on this machine; ``location`` is what another machine needs to find it: the
    same path, or the URL that ``path`` mirrors.
    """

    path: Path
    text: dict[str, Any]
    features: dict[str, Any] | None

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        return origin_of(self.path) or str(self.path.absolute())

    @property
    def is_remote(self) -> bool:
        """Whether the folder lies behind a URL."""
        return origin_of(self.path) is not None

    @property
    def ceilings(self) -> dict[str, Any] | None:
        """Bounds that the generator of the data set knows, or None."""
        return self.text["ceilings"]

    def fingerprints(self) -> dict[str, Any]:
        """What results depend on."""
        return {
            "text_fingerprint": self.text["fingerprint"],
            "features_fingerprint": self.features["fingerprint"] if self.features else None,
        }


def prepare_data(settings: Settings, report: Report = print) -> DataFolder:
    """Build whatever of the data folder is missing and return it.

    Raises:
        SettingsError: data.shards_dir holds the shards of another data set.
    """
    if settings.data.shards_dir and is_remote(settings.data.shards_dir):
        return _open_remote(settings)
    if settings.data.shards_dir and is_indexed(settings.data.shards_dir):
        return _prepare_indexed(settings, Path(settings.data.shards_dir), report)
    source = source_folder(settings.data, report)
    inputs = _inputs(settings, source)
    name = "mini_sqa" if settings.data.path is None else source.stem
    shards_dir = Path(settings.data.shards_dir or Path("data") / f"{name}-{fingerprint(inputs)}")
    if _missing(settings, shards_dir):
        with exclusive(shards_dir):
            _claim_all(settings.data, source, shards_dir, inputs)
            _build_missing(settings, source, shards_dir, report)
    else:  # may be a folder that cannot be written to
        _claim_all(settings.data, source, shards_dir, inputs)
    return open_data(settings.data, shards_dir)


def standing_mini_sqa(settings: Settings, marker: dict[str, Any] | None) -> DataFolder | None:
    """The data folder that a run's finished data step made of MiniSQA, if it stands: an earlier version's could not be drawn again."""
    shards_dir = (marker or {}).get("outputs", {}).get("shards_dir")
    own = settings.data.shards_dir
    if settings.data.path is not None or not shards_dir or is_remote(shards_dir) or is_indexed(shards_dir):
        return None
    if own is not None and (is_remote(own) or Path(own).absolute() != Path(shards_dir)):
        return None
    return None if _missing(settings, Path(shards_dir)) else open_data(settings.data, shards_dir)


def _missing(settings: Settings, shards_dir: Path) -> set[str]:
    """What of a data folder is not built yet: "text", "features", "tokenizer"."""
    needed = {"text": shards_dir / "text" / "manifest.json"}
    if settings.data.features:
        needed["features"] = shards_dir / "features" / settings.data.features / "manifest.json"
    if settings.model.pretrained is None:
        needed["tokenizer"] = shards_dir / "tokenizer"
    return {name for name, path in needed.items() if not path.exists()}


def _build_missing(settings: Settings, source: Path, shards_dir: Path, report: Report) -> None:
    missing = _missing(settings, shards_dir)
    for folder in (shards_dir / "text", shards_dir / "features" / str(settings.data.features)):
        clear_unfinished(folder)
    if "text" in missing:
        questions = read_source(settings.data, source)
        text = write_text_shards(questions, shards_dir, samples_per_shard=settings.data.samples_per_shard)
        for note in (*questions.notes, f"text: {_count(text['num_samples'])} in {len(text['shards'])} shards"):
            report(note)
    if "features" in missing:
        _build_features(settings, source, shards_dir, report)
    if "tokenizer" in missing:
        _build_tokenizer(settings, shards_dir, report)


def open_data(data: Data, shards_dir: str | Path) -> DataFolder:
    """Open a finished data folder."""
    shards_dir = Path(shards_dir)
    text = read_manifest(shards_dir / "text")
    features = read_manifest(shards_dir / "features" / data.features) if data.features else None
    if features and features["text_fingerprint"] != text["fingerprint"]:
        raise SettingsError(f"{shards_dir}/features/{data.features} was built for other text shards; delete that folder and build it again")
    if data.features in FEATURES and features["num_patches"] != (wanted := FEATURES[data.features][1][0] * data.max_pictures):
        raise SettingsError(
            f"{shards_dir}/features/{data.features} has {features['num_patches']} patches, data.max_pictures "
            f"({data.max_pictures}) needs {wanted}; delete that folder and build it again, or set data.max_pictures back"
        )
    return DataFolder(shards_dir, text, features)


def is_indexed(shards_dir: str | Path) -> bool:
    """Whether a data folder was made by indexing a user's own tars."""
    path = Path(shards_dir) / "inputs.json"
    return path.exists() and "indexed" in read_json(path)


def _open_remote(settings: Settings) -> DataFolder:
    url = settings.data.shards_dir
    if settings.data.path is not None:
        raise SettingsError(f"data.shards_dir {url} is finished, so data.path ({settings.data.path}) would not be read; leave it out")
    shards_dir = mirror_folder(url, settings.data.cache_dir, features=settings.data.features)
    if "tokenizer" in _missing(settings, shards_dir):
        raise SettingsError(f"{url} holds no tokenizer; set model.pretrained, or copy there a folder that was built without one set")
    return open_data(settings.data, shards_dir)


def _prepare_indexed(settings: Settings, shards_dir: Path, report: Report) -> DataFolder:
    if settings.data.path is not None:
        raise SettingsError(
            f"data.shards_dir {shards_dir} indexes tars, so data.path ({settings.data.path}) would not be read; leave it out"
        )
    if _missing(settings, shards_dir):
        with exclusive(shards_dir):
            missing = _missing(settings, shards_dir)
            if "features" in missing:
                _build_features(settings, None, shards_dir, report)
            if "tokenizer" in missing:
                _build_tokenizer(settings, shards_dir, report)
    return open_data(settings.data, shards_dir)


def require_all_splits(folder: DataFolder) -> None:
    """Raise SettingsError if a split that the pipeline needs holds no question."""
    for split, count in folder.text["num_samples"].items():
        if not count:
            raise SettingsError(
                f"{folder.path}: split {split!r} holds no question; training needs train, every choice val and the scores "
                "test: give each at least one"
            )


def describe_data(folder: DataFolder) -> list[str]:
    """What the folder holds, in sentences for a person; nothing missing goes unsaid."""
    lines = [f"data: {folder.path} ({_count(folder.text['num_samples'])})"]
    if not folder.features:
        return lines
    counts = folder.features["counts"]
    for split, count in counts.items():
        parts = [f"{count['num_with_features']:,} questions with one", f"{count['num_no_image']:,} without"]
        parts += [f"{count[name]:,} {text}" for name, text in _TROUBLES.items() if count[name]]
        lines.append(f"pictures of {split}: {', '.join(parts)}")
    if not counts["train"]["num_with_features"] and any(count["num_with_features"] for count in counts.values()):
        lines.append("note: no training question has a picture, so the model cannot learn to use those of val and test")
    return lines


def check_data(shards_dir: str | Path, report: Report = print, *, features: str | None = None) -> int:
    """Verify every shard of a folder and look for repeated questions; returns the number of samples checked.

    Args:
        features: which to check of a remote folder, whose files cannot be listed; locally all are.
    """
    shards_dir = local_folder(shards_dir, Data().cache_dir, features=features)
    total = 0
    for name, num_samples in check_shards(shards_dir):
        report(f"ok  {name}  {num_samples:,} samples")
        total += num_samples
    folder = Path(shards_dir) / "text"
    shards = manifest_shards(read_manifest(folder))
    duplicates = find_duplicates(
        dataclasses.replace(problem, split=shard.split) for shard in shards for problem in read_problems(folder, shard)
    )
    found = [("the same text, no picture", duplicates.without_picture), ("the same text, pictures may differ", duplicates.with_picture)]
    for label, pairs in found:
        for (first, second), texts in sorted(pairs.items()):
            where = f"within {first}" if first == second else f"LEAK between {first} and {second}"
            report(f"{where}: {len(texts):,} questions of {label}, such as {', '.join(texts[0][:4])}")
    if not any(pairs for _, pairs in found):
        report("no question comes twice")
    return total


def _inputs(settings: Settings, source: Path) -> dict[str, Any]:
    """What decides the content of the text shards and the tokenizer."""
    data = settings.data
    names = ("problems.json", "pid_splits.json", "captions.json", "ceilings.json")
    files = [source / name for name in names if (source / name).exists()]
    if not files:  # another form: every file of it that holds text
        files = [source] if source.is_file() else sorted(p for p in source.rglob("*") if p.suffix in _TEXT_SUFFIXES)
    return {
        "schema_version": SCHEMA_VERSION,
        "files": {file.name if file == source else str(file.relative_to(source)): sha256_of_file(file) for file in files},
        **({"captions": sha256_of_file(Path(data.captions))} if data.captions else {}),
        **({"splits": data.splits} if data.splits else {}),
        "samples_per_shard": data.samples_per_shard,
        "tokenizer_vocab_size": data.tokenizer_vocab_size,
        "tokenizer_formats": None if settings.model.pretrained else _tokenizer_formats(settings),
    }


def _feature_inputs(data: Data, source: Path) -> dict[str, Any]:
    """What decides the content of a feature's shards, beside the text."""
    if not _makes_features(data):
        return {"ready_made": _ready_made_facts(data)}
    return {
        "pictures": _pictures_fingerprint(source),
        "max_pictures": data.max_pictures,
        "unreadable_pictures": data.unreadable_pictures,
        **({} if data.features in FEATURES else {"encoder": data.vision_model or ENCODERS[data.features].default_model}),
    }


def _makes_features(data: Data) -> bool:
    """Whether features are made of the pictures: where published ones lie, an encoder must be asked for by name."""
    if data.features in FEATURES:
        return True
    return data.features in ENCODERS and (data.vision_model is not None or ready_made_file(data) is None)


def _pictures_fingerprint(source: Path) -> str | None:
    """Names the pictures by file and size; a data set that holds them itself is named by its own files."""
    if hf_dataset.recognizes(source):
        return None
    questions = read_questions(source)
    facts = [
        [problem.qid, path.name, path.stat().st_size if path.is_file() else None]
        for split in SPLITS for problem in questions.problems[split] for path in questions.pictures(problem)
    ]  # fmt: skip
    return fingerprint(facts)


def _ready_made_facts(data: Data) -> list[Any] | None:
    path, map_path = ready_made_file(data), _name_map(data)
    if path is None:
        return None
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns, sha256_of_file(map_path) if map_path.exists() else None]


def _claim_all(data: Data, source: Path, shards_dir: Path, inputs: dict[str, Any]) -> None:
    """Claim the folder for these texts, and its feature for these pictures."""
    if (shards_dir / "text" / "manifest.json").exists() and not (shards_dir / "inputs.json").exists():
        raise SettingsError(f"{shards_dir} holds shards of unknown origin (no inputs.json); set data.shards_dir to another folder")
    _claim(shards_dir, inputs)
    if data.features:
        folder = shards_dir / "features" / data.features
        supplied = (folder / "manifest.json").exists() and not (folder / "inputs.json").exists()
        if not supplied:
            _claim(folder, _feature_inputs(data, source))


def _claim(folder: Path, inputs: dict[str, Any]) -> None:
    """Write down what a folder is made of, or check that it is the same."""
    path = folder / "inputs.json"
    if not path.exists():
        commit_json(path, inputs)
    elif (standing := read_json(path)) != inputs:
        key = next(key for key in {**inputs, **standing} if standing.get(key) != inputs.get(key))
        raise SettingsError(
            f"{folder} holds the shards of another data set ({key} was {standing.get(key)!r} and is now "
            f"{inputs.get(key)!r}); give these a folder of their own with --set data.shards_dir=FOLDER, or delete it if no run needs it"
        )


def _build_features(settings: Settings, source: Path | None, shards_dir: Path, report: Report) -> None:
    """Features of a data set's pictures, or of those in indexed tars (``source`` None)."""
    data = settings.data
    if _makes_features(data):
        manifest = make_features(settings, source, shards_dir, report)
    else:
        features_of, shape = _open_ready_made(data)
        manifest = write_feature_shards(shards_dir, name=data.features, features_of=features_of, shape=shape)
    report(f"features {data.features}: {manifest['num_patches']} patches of {manifest['dim']}, {_pictures(manifest):,} pictures")


def ready_made_file(data: Data) -> Path | None:
    """The published feature file of a data set, such as ``vision_features/detr.npy``; None where there is none."""
    if data.path is None and data.vision_features is None:
        return None
    found = [_features_folder(data) / f"{data.features}{suffix}" for suffix in (".npy", ".pth")]
    return next((path for path in found if path.exists()), None)


def _features_folder(data: Data) -> Path:
    return Path(data.vision_features) if data.vision_features else Path(data.path or "") / "vision_features"


def _name_map(data: Data) -> Path:
    """The map from questions to rows: beside the features, or in the data set's folder."""
    beside = _features_folder(data) / "name_map.json"
    return beside if beside.exists() or data.path is None else Path(data.path) / "name_map.json"


def _open_ready_made(data: Data) -> tuple[FeaturesOf, tuple[int, int]]:
    name, path, map_path = data.features, ready_made_file(data), _name_map(data)
    if path is None or not map_path.exists():
        raise SettingsError(
            f"features {name!r} need {_features_folder(data) / name}.npy (or .pth) and {map_path}; put both there, "
            "or set data.features=patch"
        )
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        import torch

        array = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(array, torch.Tensor):
            raise FeatureError(f"{path} holds a {type(array).__name__}, expected one tensor [rows, patches, width]")
        array = array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()
    if array.ndim == 2:  # one pooled vector a row
        array = array[:, None]
    if (published := PUBLISHED_SHAPES.get(name)) and tuple(array.shape[1:]) not in (published, (1, published[1])):
        raise FeatureError(f"{path} has rows of shape {tuple(array.shape[1:])}, published {name} features have {published}")
    return ready_made_features(array, read_json(map_path), name=str(path))


def _build_tokenizer(settings: Settings, shards_dir: Path, report: Report) -> None:
    from mmcot.texts.encoding import train_tokenizer

    staging = shards_dir / ".staging-tokenizer"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    tokenizer = train_tokenizer(_corpus(settings, shards_dir), staging, vocab_size=settings.data.tokenizer_vocab_size)
    commit_folder(staging, shards_dir / "tokenizer")
    report(f"tokenizer: {len(tokenizer)} pieces, trained on the training split")


def _corpus(settings: Settings, shards_dir: Path) -> Iterable[str]:
    """Sources and targets of both stages on the training split; nothing of val and test."""
    from mmcot.texts.prompts import build_pair

    for shard in manifest_shards(read_manifest(shards_dir / "text"), "train"):
        for problem in read_problems(shards_dir / "text", shard):
            for format in _tokenizer_formats(settings):
                yield from build_pair(problem, format, use_caption=True)


def _tokenizer_formats(settings: Settings) -> list[str]:
    """One tokenizer for all chains, so that they share a data folder: that of the two stages."""
    answer = settings.answer.format if settings.chain.reads_rationales else CHAINS["two-stage"].answer_format
    return [settings.rationale.format, answer]


def _pictures(features: dict[str, Any]) -> int:
    return sum(count["num_with_features"] for count in features["counts"].values())


def _count(num_samples: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in num_samples.items())
