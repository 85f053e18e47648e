"""Valid inputs of every kind, small, and what reads them: each is damaged by ``mutants.py`` and read again.

    inputs = make_inputs(folder)             # {"table.csv": Input, ...}
    inputs["table.csv"].read()               # what was read, as plain values to compare, and what was said

An input stands at one place; ``restore`` brings it back after it was damaged and read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

MADE = Path(__file__).parents[1] / "golden" / "run_0_1_0" / "made.tar.xz"
STAGES = ("rationale", "answer")


@dataclasses.dataclass
class Read:
    """What a reader returned: samples by id, any other content, and the sentences it said."""

    samples: dict[str, Any] = dataclasses.field(default_factory=dict)
    content: Any = None
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Input:
    """A kind of input: its folder, the files of it that are damaged, and its readers by name."""

    name: str
    folder: Path
    pristine: Path
    patterns: tuple[str, ...]
    readers: dict[str, Callable[[Path], Read]]
    is_sealed: bool = False  # an accepted one must have the same content
    is_slow: bool = False

    def files(self) -> list[Path]:
        """The files that are damaged, in a fixed order."""
        found = {path for pattern in self.patterns for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(found)

    def restore(self) -> None:
        """Put the valid input back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder, symlinks=True)


def make_inputs(root: Path) -> dict[str, Input]:
    """Make all inputs below a folder."""
    made = root / "made"
    with tarfile.open(MADE) as archive:
        archive.extractall(root, filter="data")
    (root / "run_0_1_0").rename(made)
    for path in made.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".yaml") and "PLACE" in (text := path.read_text(encoding="utf-8")):
            path.write_text(text.replace("PLACE", str(made)), encoding="utf-8")
    (made / "runs" / "finished" / "report.html").unlink()
    inputs = [*_sources(root, made), *_data(root, made), *_runs(root, made)]
    return {each.name: each for each in inputs}


def _input(root: Path, name: str, make: Callable[[Path], None], patterns: Any, readers: Any, **more: Any) -> Input:
    folder, pristine = root / "work" / name.replace(" ", "-"), root / "valid" / name.replace(" ", "-")
    made = Input(name, folder, pristine, tuple(patterns), readers, **more)
    folder.mkdir(parents=True)
    make(folder)
    shutil.copytree(folder, pristine, symlinks=True)
    return made


# Data sets -----------------------------------------------------------------------------------------------------------

_ROWS = [
    {
        "qid": f"q{number}",
        "question": f"Which is number {number}?",
        "choices": [f"n{number}", "none", "both"],
        "answer": number % 3,
        "context": f"Count to {number}.",
        "rationale": "It is counted.",
        "split": ("train", "train", "val", "test")[number % 4],
    }
    for number in range(12)
]


def _csv_text() -> str:
    lines = ["qid,question,choices,answer,context,split"]
    for row in _ROWS:
        choices = "|".join(row["choices"])
        quoted = f'"Look, a ""{row["qid"]}""\nof two lines"'
        lines.append(
            f"{row['qid']},{row['question']},{choices},{row['choices'][row['answer']]},{quoted},{row['split']}"
        )
    return "\n".join(lines) + "\n"


def _jsonl_text(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _table_folder(folder: Path) -> None:
    for split in ("train", "val", "test"):
        rows = [{**row, "image": "p.png"} for row in _ROWS if row["split"] == split]
        (folder / f"{split}.jsonl").write_text(_jsonl_text(rows), encoding="utf-8")
    (folder / "p.png").write_bytes(_png())


def _png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 10, 10)).save(buffer, "png")
    return buffer.getvalue()


def _npy(value: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def _science_qa(made: Path) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        source = next(made.glob("data/mini_sqa-source-*"))
        problems = json.loads((source / "problems.json").read_text(encoding="utf-8"))
        splits = json.loads((source / "pid_splits.json").read_text(encoding="utf-8"))
        kept = [*splits["train"][:5], *splits["val"][:3], *splits["test"][:3]]
        lists = {name: [qid for qid in qids if qid in kept] for name, qids in splits.items()}
        captions = json.loads((source / "captions.json").read_text(encoding="utf-8"))["captions"]
        contents = {
            "problems": {qid: problems[qid] for qid in kept},
            "pid_splits": lists,
            "captions": {"captions": {qid: text for qid, text in captions.items() if qid in kept}},
            "ceilings": json.loads((source / "ceilings.json").read_text(encoding="utf-8")),
        }
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    return make


def _saved_data_set(folder: Path) -> None:
    import datasets

    parts = {}
    for split in ("train", "val", "test"):
        rows = [{name: row[name] for name in row if name != "split"} for row in _ROWS if row["split"] == split]
        parts[split] = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    datasets.DatasetDict(parts).save_to_disk(str(folder / "saved"))


def _tars(folder: Path) -> None:
    for split in ("train", "val", "test"):
        with tarfile.open(folder / f"{split}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in [row for row in _ROWS if row["split"] == split]:
                content = {name: row[name] for name in row if name not in ("split", "qid")}
                members = {"json": json.dumps(content).encode(), "png": _png()}
                members["npy"] = _npy(np.ones((2, 4), np.float16))
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{row['qid']}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _published(folder: Path) -> None:
    import torch

    features = np.arange(6 * 100 * 256, dtype=np.float32).reshape(6, 100, 256) % 7
    (folder / "detr.npy").write_bytes(_npy(features[:, :1]))
    torch.save(torch.from_numpy(features[:2, :, :8].copy()), folder / "own.pth")
    (folder / "name_map.json").write_text(json.dumps({f"q{n}": str(n) for n in range(2)}), encoding="utf-8")


def sample_facts(sample: Any) -> list[Any]:
    """A sample's values, to compare."""
    facts = dataclasses.asdict(sample)
    return [[name, facts[name]] for name in sorted(facts)]


def _read_source(path: Path) -> Read:
    from data_shards.sources.forms import read_questions

    found = read_questions(path)
    everything = [sample for split in found.problems for sample in found.problems[split]]
    for sample in everything:
        found.pictures(sample)
    content = [found.lists, found.ceilings]
    return Read({sample.qid: sample_facts(sample) for sample in everything}, content, list(found.notes))


def _described(path: Path) -> Read:
    from launcher.data.describe import describe_questions, description_lines

    return Read(notes=description_lines(describe_questions(path, tokenizer=None)))


def _content_files(path: Path) -> Read:
    from data_shards.sources.forms import form_of

    form_of(path).content_files(path)
    return Read()


def _read_rows_to_predict(path: Path) -> Read:
    from launcher.generation.predict_rows import read_questions

    found = read_questions(path, lambda sample: None)
    samples = {str(row.qid): sample_facts(row.sample) if row.sample else row.error for row in found.rows}
    return Read(samples, None, [*found.notes, *(str(fault) for fault in found.faults.first)])


def _indexed(folder: Path) -> Read:
    from data_shards.indexed_tars import index_tars, pictures_in_tars
    from data_shards.reader import SplitReader

    notes: list[str] = []
    out, splits = folder / "out", ("train", "val", "test")
    index_tars({split: [folder / f"{split}.tar"] for split in splits}, out, features="own", report=notes.append)
    found = Read(notes=notes)
    pictures_of = pictures_in_tars(out)
    for split in splits:
        reader = SplitReader(out, split, features="own")
        for number in range(len(reader)):
            sample, features = reader.problem(number), reader.features(number)
            pictures = [len(picture) for picture in pictures_of(sample)]
            found.samples[sample.qid] = [sample_facts(sample), np.asarray(features).tolist(), pictures]
    return found


def _published_read(name: str) -> Callable[[Path], Read]:
    def read(folder: Path) -> Read:
        from launcher.config.settings import Data
        from launcher.data.published_features import open_ready_made
        from mmcot.texts.sample import Sample

        data = Data.model_validate({"features": name, "vision_features": str(folder), "path": str(folder)})
        features_of, shape = open_ready_made(data)
        counts: Counter[str] = Counter()
        problems = [Sample(qid=f"q{number}", question="a", choices=("a", "b"), answer=0) for number in range(2)]
        found = {problem.qid: features_of(problem, counts)[:, :4].tolist() for problem in problems}
        return Read(found, [shape], [f"{key}: {value}" for key, value in counts.items()])

    return read


def _sources(root: Path, made: Path) -> list[Input]:
    readers = {"read": _read_source, "describe": _described, "content files": _content_files}

    def of_file(name: str, readers: dict[str, Callable[[Path], Read]]) -> dict[str, Callable[[Path], Read]]:
        return {key: lambda folder, read=read: read(folder / name) for key, read in readers.items()}

    tables = {**readers, "predict": _read_rows_to_predict}
    saved = ["saved/*.json", "saved/*/*.json", "saved/*/*.arrow"]
    return [
        _input(root, "table.csv", _writer("t.csv", _csv_text()), ["t.csv"], of_file("t.csv", tables)),
        _input(root, "table.jsonl", _writer("t.jsonl", _jsonl_text(_ROWS)), ["t.jsonl"], of_file("t.jsonl", tables)),
        _input(root, "folder of tables", _table_folder, ["*.jsonl"], readers),
        _input(root, "ScienceQA", _science_qa(made), ["*.json"], readers),
        _input(root, "saved data set", _saved_data_set, saved, of_file("saved", readers)),
        _input(root, "own tars", _tars, ["*.tar"], {"index": _indexed}),
        _input(
            root,
            "published features",
            _published,
            ["*.npy", "*.pth", "name_map.json"],
            {name: _published_read(name) for name in ("own", "detr")},
        ),
    ]


def _writer(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


# A data folder, and folders of texts ---------------------------------------------------------------------------------


def _data_folder(made: Path) -> Callable[[Path], None]:
    """The data folder of a run, as the present version writes it: sealed manifests with the sha256 of every index."""

    def make(folder: Path) -> None:
        from data_shards.atomic_files import sha256_of_file
        from data_shards.sealed_json import commit_sealed

        shutil.copytree(made / "data" / "quiz", folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "lengths")
        for path in sorted(folder.rglob("manifest.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            for shard in content["shards"]:
                shard["index_sha256"] = sha256_of_file(path.parent / f"{shard['name']}.parquet")
            if "text_fingerprint" in content:
                content["text_fingerprint"] = json.loads((folder / "text" / "manifest.json").read_text())["fingerprint"]
            commit_sealed(path, content)
        # "features" is before "text" in the alphabet: its manifest names the text's new fingerprint
        features = folder / "features" / "patch" / "manifest.json"
        text = json.loads((folder / "text" / "manifest.json").read_text(encoding="utf-8"))
        content = json.loads(features.read_text(encoding="utf-8"))
        commit_sealed(features, {**content, "text_fingerprint": text["fingerprint"]})

    return make


def _opened(folder: Path) -> Read:
    from data_shards.reader import SplitReader
    from launcher.config.settings import Data
    from launcher.data.build import describe_data
    from launcher.evaluation.tables import ceiling_rows
    from launcher.stages.data_folder import is_indexed, open_data

    data = open_data(Data.model_validate({"features": "patch", "shards_dir": str(folder)}), folder)
    found = Read(content=[data.text["num_samples"], data.text.get("lists"), data.fingerprints()])
    describe_data(data)
    is_indexed(folder)
    for split in ("train", "val", "test"):
        reader = SplitReader(folder, split, features="patch")
        problems = {}
        for number in range(len(reader)):
            sample, features = reader.problem(number), reader.features(number)
            problems[sample.qid] = sample
            found.samples[sample.qid] = [sample_facts(sample), round(float(np.asarray(features, np.float64).sum()), 2)]
        if problems:
            ceiling_rows(problems, data.ceilings)
        list(reader.qids)
        reader.close()
    return found


def _checked(folder: Path) -> Read:
    from launcher.data.check import check_data

    notes: list[str] = []
    return Read(content=check_data(folder, notes.append), notes=notes)


def _tokenizer_of(folder: Path) -> Read:
    from mmcot.texts.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(folder / "tokenizer")
    return Read(content=tokenizer("Which is it?")["input_ids"])


def _texts(made: Path) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from data_shards.sealed_json import commit_sealed

        shutil.copytree(made / "runs" / "finished" / "rationales", folder / "rationales")
        path = folder / "rationales" / "manifest.json"
        commit_sealed(path, json.loads(path.read_text(encoding="utf-8")))

    return make


def _texts_read(made: Path) -> Callable[[Path], Read]:
    def read(folder: Path) -> Read:
        from data_shards.generated_texts import list_tasks, open_output, reason_to_write_again, verified_files
        from data_shards.generation_ledger import read_ledger
        from data_shards.rationale_reader import RationaleReader

        output = folder / "rationales"
        found = Read()
        for task in list_tasks(made / "data" / "quiz", ["val"], task_samples=16):
            reason_to_write_again(output, task, ["65"])
        open_output(output, json.loads((made / "runs/finished/rationales/manifest.json").read_text())["inputs"])
        for split in ("train", "val", "test"):
            reader = RationaleReader(output, split)
            found.samples |= reader.by_qid()
        first = RationaleReader(output, "train")
        with contextlib.suppress(StopIteration):
            qid = next(iter(first.by_qid()))
            first.text(0, 0, qid)
        found.content = [verified_files(output), [dataclasses.astuple(text) for text in read_ledger(output)]]
        return found

    return read


def _unsealed_texts(made: Path) -> Callable[[Path], None]:
    """Texts of an earlier version, and a part of them that is not complete, with its ledger."""

    def make(folder: Path) -> None:
        shutil.copytree(made / "runs" / "finished" / "rationales", folder / "rationales")

    return make


def _part_of_texts(made: Path) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from data_shards.generated_texts import list_tasks, open_output, write_task
        from data_shards.text_lines import read_lines

        output = folder / "rationales"
        open_output(output, {"format": "QCM-E"})
        for task in list_tasks(made / "data" / "quiz", ["val"], task_samples=16):
            write_task(output, task, read_lines(made / "runs" / "finished" / "rationales" / task.file_name))

    return make


def _part_read(made: Path) -> Callable[[Path], Read]:
    def read(folder: Path) -> Read:
        from data_shards.generated_texts import list_tasks, open_output, reason_to_write_again, sha256_written
        from data_shards.text_lines import read_lines

        output, reasons = folder / "rationales", []
        open_output(output, {"format": "QCM-E"})
        for task in list_tasks(made / "data" / "quiz", ["val"], task_samples=16):
            qids = [line["qid"] for line in read_lines(made / "runs" / "finished" / "rationales" / task.file_name)]
            reasons.append(reason_to_write_again(output, task, qids))
            sha256_written(output, task)
        return Read(content=None, notes=[str(reason) for reason in reasons if reason])

    return read


def _data(root: Path, made: Path) -> list[Input]:
    files = ["**/*.json", "**/*.parquet", "**/*.tar"]
    readers = {"open": _opened, "check": _checked}
    return [
        _input(root, "data folder", _data_folder(made), files, readers, is_sealed=True),
        _input(
            root,
            "data folder of 0.1.0",
            lambda folder: shutil.copytree(made / "data" / "quiz", folder, dirs_exist_ok=True) and None,
            ["text/*.json", "features/patch/*.json", "*.json", "text/*.parquet"],
            readers,
        ),
        _input(root, "tokenizer", _data_folder(made), ["tokenizer/*.json"], {"tokenizer": _tokenizer_of}),
        _input(root, "rationales", _texts(made), ["**/*.json*"], {"read": _texts_read(made)}, is_sealed=True),
        _input(root, "rationales of 0.1.0", _unsealed_texts(made), ["**/manifest.json"], {"read": _texts_read(made)}),
        _input(root, "unfinished rationales", _part_of_texts(made), ["**/*.json*"], {"read": _part_read(made)}),
    ]


# Runs ----------------------------------------------------------------------------------------------------------------


def _finished_run(made: Path) -> Callable[[Path], None]:
    """The finished run of version 0.1.0 with the files that later versions add."""

    def make(folder: Path) -> None:
        from data_shards.atomic_files import commit_json, sha256_of_file
        from data_shards.sealed_json import commit_sealed
        from launcher.runs.exported import describe_export

        shutil.copytree(made / "runs" / "finished", folder, dirs_exist_ok=True)
        commit_json(folder / "device.json", {"use_gpu": False, "found": 0, "where": "this machine"})
        commit_json(folder / "zero_stage.json", {"zero_stage": 1, "reason": "a test"})
        for step in ("data", "train-rationale", "rationales", "train-answer", "evaluate"):
            commit_json(folder / "logs" / f"code-{step}.json", {"began": "0.1.0 abc", "last": "0.1.0 abc"})
        for path in folder.glob("*/checkpoints/*/manifest.json"):
            content = json.loads(path.read_text(encoding="utf-8"))
            states = path.parent / "state" / "mp_rank_00_model_states.pt"
            states.parent.mkdir()
            states.write_bytes(b"a state")
            files = {states.name: {"size_bytes": states.stat().st_size, "sha256": sha256_of_file(states)}}
            run_id = (folder / "logs" / "identity").read_text(encoding="utf-8")
            commit_sealed(path, {**content, "files": files, "run_id": run_id})
        tracking = folder / "logs" / "tracking.jsonl"
        lines = tracking.read_text(encoding="utf-8").splitlines(keepends=True)
        # What these log needs a registry, which is no stand-in.
        kept = [line for line in lines if json.loads(line)["do"] not in ("model", "trained")]
        tracking.write_text("".join(kept), encoding="utf-8")
        ledger = [
            {"step": step, "steps_per_epoch": 2, "blocks": {str(block): _block(step, block) for block in range(4)}}
            for step in range(2)
        ]
        (folder / "logs" / "rationale-ledger-rank0.jsonl").write_text(_jsonl_text(ledger), encoding="utf-8")
        for stage in STAGES:
            marker = folder / "steps" / f"train-{stage}.json"
            content = json.loads(marker.read_text(encoding="utf-8"))
            content["outputs"] = describe_export(stage, folder / stage / "model")
            commit_json(marker, content)
        status = folder.stat()
        mark = {"device": status.st_dev, "inode": status.st_ino, "path": str(folder), "earlier": ["/earlier/runs/demo"]}
        commit_json(folder / "logs" / "identity-place.json", mark)

    return make


def _block(step: int, block: int) -> list[str]:
    start = step * 32 + block * 8
    return [str(number + 1) for number in range(start, start + 8)]


def _status(folder: Path) -> Read:
    from launcher.runs.status import describe_run

    return Read(notes=describe_run(folder))


def _report(folder: Path) -> Read:
    from launcher.report.render import write_report

    write_report([folder], folder / "page.html", num_pictures=2, num_looked_at=0)
    return Read()


def _ledger(folder: Path) -> Read:
    from launcher.cli.data import data_ledger

    with _raising():
        data_ledger(folder)
    return Read()


@contextlib.contextmanager
def _raising():
    """Let errors through, which a command prints."""
    import launcher.cli.data as module

    kept = module.errors_as_messages
    module.errors_as_messages = contextlib.nullcontext
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        module.errors_as_messages = kept


def _resume(folder: Path) -> Read:
    """What `mmcot run` and `mmcot evaluate RUN` read before they do anything."""
    from launcher.cluster.gpus import computes_on_gpu, with_device
    from launcher.data.build import standing_mini_sqa
    from launcher.pipeline.attempt import Attempt
    from launcher.runs.adoption import continue_here, copied_from
    from launcher.runs.code_version import begin_with_code, code_of_step
    from launcher.runs.ownership import owned, owner
    from launcher.runs.run_dir import RunDir, shards_dir_of
    from launcher.runs.run_settings import has_begun, keep_name, keep_zero_stage, settings_of, write_or_verify_settings
    from launcher.tracking.sending import is_everything_logged
    from launcher.training.identity import settle_identity
    from launcher.training.zero_stage import _decided

    notes: list[str] = []
    run_dir = RunDir(folder)
    settings = settings_of(run_dir)
    has_begun(run_dir)
    settings = keep_zero_stage(run_dir, keep_name(run_dir, settings))
    write_or_verify_settings(run_dir, settings)
    copied_from(run_dir)
    owner(run_dir)
    with owned(run_dir, take_over=True) as number:
        continue_here(run_dir, report=notes.append)
        settings = with_device(settings, run_dir, notes.append, keep=False)
        computes_on_gpu(run_dir)
        shards_dir_of(run_dir)
        data = standing_mini_sqa(settings, run_dir.data_marker())
        if data is not None:
            settle_identity(run_dir, settings, data)
        attempt = Attempt(settings, run_dir, number, notes.append, contextlib.ExitStack())
        for step in settings.chain.steps:
            marker = run_dir.marker(step)
            if marker is not None:
                attempt.run_step(step, marker.get("inputs", {}), lambda child: {})
            begin_with_code(run_dir, step)
            code_of_step(run_dir, step)
        attempt.verify_models()
        run_dir.check_attempt(number)
        run_dir.stop_requested(number)
        _decided(run_dir, "rationale")
        is_everything_logged(run_dir)
    return Read(notes=notes)


def _checkpoints(folder: Path) -> Read:
    """What the ranks of a resumed training read of their checkpoints."""
    import torch.distributed as dist

    from launcher.runs.checkpoint_names import latest_checkpoint
    from launcher.runs.run_dir import RunDir
    from launcher.training.checkpoint_resume import find_checkpoint
    from launcher.training.identity import _id_of_checkpoints

    run_dir, found = RunDir(folder), Read()
    _id_of_checkpoints(run_dir, STAGES)
    facts = {"world_size": 1, "precision": "fp32", "nvme": False}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for stage in STAGES:
            latest_checkpoint(run_dir.checkpoints(stage))
            if (
                checkpoint := find_checkpoint(run_dir.checkpoints(stage), facts=facts, may_commit=lambda: None)
            ) is None:
                found.notes.append(f"{stage} has no checkpoint")
            else:
                found.notes += checkpoint.notes
                found.content = checkpoint.step
    finally:
        dist.destroy_process_group()
    return found


def _predict(folder: Path) -> Read:
    from launcher.generation.predictor import RunPredictor
    from mmcot.texts.sample import Sample

    predictor = RunPredictor(folder, report=lambda line: None)
    _ = predictor.answers_with_letters
    predictor.identity()
    problem = Sample(qid="1", question="Which is it?", choices=("this", "that"))
    return Read(content=list(predictor.answer([problem], folder)))


def _tokens_of_models(folder: Path) -> Read:
    from launcher.generation.standalone import _settings
    from launcher.report.run_facts import describe_model

    return Read(content=[describe_model(folder / "model"), str(_settings(folder / "model", []))])


def _opened_model(folder: Path) -> Read:
    from mmcot.models.opening import open_model
    from mmcot.texts.tokenizer import open_tokenizer

    model = open_model(folder / "model")
    tokens = open_tokenizer(folder / "model")("Which is it?")["input_ids"]
    return Read(content=[tokens, model.config.vision_dim, int(sum(part.numel() for part in model.parameters()))])


def _sync(folder: Path) -> Read:
    from launcher.runs.run_dir import RunDir
    from launcher.runs.run_settings import settings_of
    from launcher.tracking.mlflow_sync import MlflowSync
    from launcher.tracking.sending import is_everything_logged

    run_dir = RunDir(folder)
    settings_of(run_dir)
    is_everything_logged(run_dir)
    for uri in ("sqlite:///" + str(folder / "mlflow.db"), json.loads(_pristine_state())["uri"]):
        sync = MlflowSync(run_dir, uri=uri, experiment="test")
        sync.num_waiting()
    sync._client = _TakesAll()
    sync._restart(sync._fresh_state())
    sync._experiment_id = "1"
    sync._send_new()
    return Read(content=len(sync.refused), notes=[str(line) for line in sync.refused])


@cache
def _pristine_state() -> str:
    with tarfile.open(MADE) as archive:
        file = archive.extractfile("run_0_1_0/runs/finished/mlflow.json")
        assert file is not None
        return file.read().decode()


class _TakesAll:
    """A client of MLflow that takes everything that the real one's types admit."""

    def __init__(self) -> None:
        self._ids = itertools.count()

    def create_run(self, experiment_id, run_name, tags, start_time):
        from types import SimpleNamespace

        return SimpleNamespace(info=SimpleNamespace(run_id=f"{next(self._ids):032x}"))

    def get_run(self, run_id):
        from types import SimpleNamespace

        data = SimpleNamespace(params={}, metrics={})
        return SimpleNamespace(data=data, inputs=SimpleNamespace(dataset_inputs=[]))

    def search_runs(self, *arguments, **options):
        return []

    def search_logged_models(self, *arguments, **options):
        return []

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def _scored(made: Path) -> Callable[[Path], Read]:
    def read(folder: Path) -> Read:
        from launcher.evaluation.external_predictions import format_scores, score_file

        source = next(made.glob("data/mini_sqa-source-*"))
        scored = score_file(folder / "test.jsonl", source, split="test", rationale_format="QCM-E")
        return Read(content=scored.report, notes=format_scores(scored, path=folder / "test.jsonl", against_paper=True))

    return read


def _settings(folder: Path) -> Read:
    from launcher.config.loading import load_settings

    return Read(content=load_settings(config=folder / "quiz.yaml").model_dump())


def _runs(root: Path, made: Path) -> list[Input]:
    run = _finished_run(made)
    kept = ["*.json", "steps/*.json", "logs/*", "rationale/checkpoints/**/*", "answer/checkpoints/**/*"]
    texts = ["predictions/*.jsonl", "rationales/**/*.jsonl", "rationales/*.json"]
    model = ["model/*"]

    def copy_of(name: str, target: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            source, place = made / name, folder / target
            if source.is_dir():
                shutil.copytree(source, place)
            else:
                shutil.copy(source, place)

        return make

    return [
        _input(root, "run", run, kept, {"status": _status, "resume": _resume}),
        _input(root, "run to report", run, [*kept, *texts], {"report": _report}, is_slow=True),
        _input(root, "run with a ledger", run, ["logs/*-ledger-*", "steps/data.json"], {"ledger": _ledger}),
        _input(root, "run to send", run, ["logs/*.jsonl", "mlflow.json", "logs/identity*"], {"sync": _sync}),
        _input(root, "checkpoints", run, ["*/checkpoints/**/*"], {"checkpoints": _checkpoints}),
        _input(
            root,
            "run to predict with",
            run,
            ["answer/model/*", "predictions/*.jsonl", *kept],
            {"predict": _predict},
            is_slow=True,
        ),
        _input(
            root,
            "exported model",
            copy_of("runs/finished/rationale/model", "model"),
            model,
            {"facts": _tokens_of_models, "open": _opened_model},
        ),
        _input(
            root,
            "predictions",
            copy_of("runs/finished/predictions/test.jsonl", "test.jsonl"),
            ["test.jsonl"],
            {"score": _scored(made)},
        ),
        _input(root, "settings", copy_of("quiz.yaml", "quiz.yaml"), ["quiz.yaml"], {"load": _settings}),
    ]
