"""Whose checkpoints a training takes up: its own run's, of the same settings and data, and no other's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from data_shards.indexed_tars import index_tars
from data_shards.remote_files import list_names, put_bytes, put_file
from data_shards.sources.question_set import SPLITS
from launcher.config.loading import dump_settings
from launcher.runs.run_dir import RunDir, RunError
from launcher.stages.data_folder import DataFolder
from launcher.training.checkpoint import CheckpointError, begin_checkpoint, commit_checkpoint
from launcher.training.checkpoint_resume import find_checkpoint
from launcher.training.checkpoint_store import (
    checkpoint_store,
    fetch_latest,
    publish_checkpoint,
    upload_share,
)
from launcher.training.identity import (
    claim_store,
    data_content,
    run_facts,
    settings_content,
    settle_identity,
    store_root,
)
from launcher.training.torchrun import read_job
from launcher.tuning.handover import hand_over

PLAN = {"plan_fingerprint": "p1", "world_size": 1, "zero_stage": 2, "precision": "fp32", "nvme": False}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def save_checkpoint(engine, folder, *, step, facts, keep, may_commit):
    pending = begin_checkpoint(engine, folder, step=step, facts=facts, may_commit=may_commit)
    commit_checkpoint(pending, keep=keep, may_commit=may_commit)


class Engine:
    """Writes a state as DeepSpeed does: a file in a folder."""

    def __init__(self, state):
        self.state, self.checkpoint_engine = state, None

    def save_checkpoint(self, folder, *, tag, save_latest):
        (Path(folder) / tag / "weights.pt").write_bytes(self.state)


@dataclasses.dataclass
class Run:
    """A run's folder with its settings and data, as one rank works with it."""

    run_dir: RunDir
    settings: object
    folder: DataFolder
    rationales_dir: str | None = None

    @property
    def stage(self):
        return "answer" if self.rationales_dir else "rationale"

    @property
    def checkpoints(self):
        return self.run_dir.checkpoints(self.stage)

    def begin(self):
        """What the driver and then a rank do before the first step; returns the notes and the checkpoint found."""
        settle_identity(self.run_dir, self.settings, self.folder)
        self.facts = run_facts(
            self.settings,
            self.folder,
            self.run_dir.identity(),
            texts={"rationales": self.rationales_dir} if self.rationales_dir else {},
        )
        if root := store_root(self.settings, self.facts):
            self.claim_note = claim_store(root, self.run_dir, self.facts["run_id"])
        notes = (
            fetch_latest(self.settings, self.stage, self.checkpoints, facts=self.facts, may_commit=lambda: None)
            if root
            else []
        )
        found = find_checkpoint(self.checkpoints, facts={**PLAN, **self.facts}, may_commit=lambda: None)
        return [*notes, *(found.notes if found else [])], found

    def save(self, step, state=b"weights", facts=None):
        save_checkpoint(
            Engine(state),
            self.checkpoints,
            step=step,
            facts={**PLAN, **(self.facts if facts is None else facts), "probe_loss": 1.0},
            keep=2,
            may_commit=lambda: None,
        )
        if self.url and facts is None:
            path = self.checkpoints / f"step-{step:06d}"
            upload_share(path, self.url, rank=0, world_size=1)
            publish_checkpoint(path, self.url, keep=2, may_commit=lambda: None)

    @property
    def url(self):
        return checkpoint_store(self.settings, self.stage, self.facts)

    def state(self, step):
        return (self.checkpoints / f"step-{step:06d}" / "state" / "weights.pt").read_bytes()


def with_settings(settings, **sections):
    return settings.model_copy(
        update={name: getattr(settings, name).model_copy(update=values) for name, values in sections.items()}
    )


@pytest.fixture
def make_run(tiny_settings, tiny_data, tmp_path, s3, one_rank):
    """A function that gives a run a new folder; all of one test share a store of their own."""

    def make(name, *, folder=tiny_data, store=True, rationales_dir=None, **sections):
        url = f"s3://bucket/{tmp_path.name}" if store else None
        sections = {**sections, "training": {"checkpoint_url": url, **sections.get("training", {})}}
        run_dir = RunDir(tmp_path / name)
        run_dir.path.mkdir()
        return Run(run_dir, with_settings(tiny_settings, **sections), folder, rationales_dir)

    return make


# What names the data


def test_the_same_data_has_one_fingerprint_wherever_it_lies_and_corrected_texts_another(
    tiny_settings, tiny_data, corrected_data, tmp_path
):
    shutil.copytree(tiny_data.path, tmp_path / "moved")
    moved = DataFolder(tmp_path / "moved", read_json(tmp_path / "moved" / "text" / "manifest.json"), tiny_data.features)
    assert (
        data_content(tiny_settings, moved)
        == data_content(tiny_settings, tiny_data)
        != data_content(tiny_settings, corrected_data)
    )


def test_tars_indexed_at_two_places_are_the_same_data(tiny_settings, tiny_data, tmp_path):
    folders = []
    for place in ("a", "b"):
        shutil.copytree(tiny_data.path / "text", tmp_path / place / "tars")
        shutil.copytree(tiny_data.path / "tokenizer", tmp_path / place / "data" / "tokenizer")
        tars = {split: sorted((tmp_path / place / "tars").glob(f"{split}-*.tar")) for split in SPLITS}
        folders.append(
            DataFolder(tmp_path / place / "data", index_tars(tars, tmp_path / place / "data", features=None), None)
        )
    assert folders[0].fingerprints() != folders[1].fingerprints()  # they name the tars' places
    assert data_content(tiny_settings, folders[0]) == data_content(tiny_settings, folders[1])


def test_another_tokenizer_is_other_data_even_under_the_same_path(tiny_settings, tiny_data, tmp_path):
    commit_json(tmp_path / "tokenizer.json", {"pieces": 1})
    settings = with_settings(tiny_settings, model={"pretrained": str(tmp_path)})
    before = data_content(settings, tiny_data)
    commit_json(tmp_path / "tokenizer.json", {"pieces": 2, "added": 0})
    assert data_content(settings, tiny_data) != before


def test_where_data_lie_is_no_part_of_the_settings_and_a_learning_rate_is(tiny_settings, tmp_path):
    moved = with_settings(tiny_settings, data={"shards_dir": str(tmp_path), "path": str(tmp_path)})
    other = with_settings(tiny_settings, training={"learning_rate": 0.5})
    assert settings_content(moved) == settings_content(tiny_settings) != settings_content(other)


def test_given_rationales_are_a_setting_by_their_content(tiny_settings, tmp_path):
    for name, sha256 in (("a", "1"), ("copy", "1"), ("b", "2")):
        commit_json(
            tmp_path / name / "manifest.json",
            {"complete": True, "files": {"train/000000-000000.jsonl": {"sha256": sha256}}},
        )
    a, copy, b = (
        settings_content(with_settings(tiny_settings, answer={"rationales": str(tmp_path / name)}))
        for name in ("a", "copy", "b")
    )
    assert a == copy != b


# The store


def test_a_run_with_corrected_texts_does_not_take_up_the_checkpoints_of_another(make_run, corrected_data):
    first, second = make_run("a"), make_run("b", folder=corrected_data)
    first.begin()
    first.save(2, b"of a")
    assert second.begin() == ([], None)
    assert second.url != first.url and second.run_dir.identity() != first.run_dir.identity()


def test_a_machine_that_starts_empty_takes_up_the_checkpoint_and_the_id(make_run):
    first, again = make_run("a"), make_run("b")
    first.begin()
    first.save(2, b"of a")
    notes, found = again.begin()
    assert (notes, found.step, again.state(2)) == ([], 2, b"of a")
    assert again.run_dir.identity() == first.run_dir.identity() == found.manifest["run_id"]
    assert "was last written from" in again.claim_note and str(first.run_dir.path) in again.claim_note


def test_a_folder_with_an_id_of_its_own_is_refused_with_both_ids_and_what_to_do(make_run):
    first, second = make_run("a"), make_run("b")
    first.begin()
    own = second.run_dir.identity()
    with pytest.raises(RunError) as caught:
        second.begin()
    root = store_root(first.settings, first.facts)
    assert all(
        part in str(caught.value)
        for part in (
            root,
            own,
            first.facts["run_id"],
            "another run.name",
            "another training.checkpoint_url",
            f"delete {root}",
        )
    )


def test_a_checkpoint_of_another_run_is_refused_by_every_rank_though_the_driver_let_it_pass(make_run):
    first, second = make_run("a"), make_run("b")
    first.begin()
    first.save(2)
    facts = {**first.facts, "run_id": "another"}
    with pytest.raises(
        CheckpointError, match=f"holds checkpoints of another run .*id {first.facts['run_id']}, this run's is another"
    ):
        fetch_latest(second.settings, "rationale", second.checkpoints, facts=facts, may_commit=lambda: None)
    assert not list(second.checkpoints.glob("step-*"))


def test_a_run_whose_folder_of_the_store_was_claimed_by_another_writes_nothing_there(make_run):
    first = make_run("a")
    first.begin()
    put_bytes(
        json.dumps({"run_id": "another", "run_dir": "elsewhere"}).encode(),
        f"{store_root(first.settings, first.facts)}/run.json",
    )
    with pytest.raises(RunError, match="another run of the same name, settings and data \\(id another"):
        first.save(2)
    assert list_names(first.url) == [] and (first.checkpoints / "LATEST").exists()


def test_an_answer_stage_trained_on_other_rationales_is_another(make_run, tmp_path):
    for name, sha256 in (("generated", "a1"), ("given", "b2")):
        commit_json(
            tmp_path / name / "manifest.json",
            {"complete": True, "files": {"train/000000-000000.jsonl": {"sha256": sha256}}},
        )
    first, second = (make_run(f"of-{name}", rationales_dir=str(tmp_path / name)) for name in ("generated", "given"))
    first.begin()
    first.save(2)
    assert second.begin() == ([], None) and second.url != first.url
    shutil.copytree(first.checkpoints, second.checkpoints)
    with pytest.raises(CheckpointError, match="step-000002 was written with rationales_fingerprint"):
        second.begin()


# The run's own folder


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("data_fingerprint", "restore the data"),
        ("settings_fingerprint", "resume with the settings"),
        ("run_id", "restore the checkpoints"),
    ],
)
def test_a_local_checkpoint_of_other_data_settings_or_run_is_refused(make_run, key, remedy):
    run = make_run("a", store=False)
    run.begin()
    run.save(2, facts={**run.facts, key: "another"})
    with pytest.raises(
        CheckpointError, match=f"step-000002 was written with {key} = 'another', now it is '{run.facts[key]}'.*{remedy}"
    ):
        run.begin()


def test_a_local_checkpoint_of_an_earlier_version_is_taken_up_with_one_note(make_run):
    run = make_run("a", store=False)
    run.begin()
    run.save(2, facts={})
    (note,), found = run.begin()
    assert found.step == 2 and "written by an earlier version" in note and "data_fingerprint" in note
    run.save(4)
    assert run.begin()[0] == []


def test_a_run_whose_logs_were_deleted_keeps_the_id_of_its_checkpoints(make_run):
    run = make_run("a", store=False)
    run.begin()
    run.save(2)
    shutil.rmtree(run.run_dir.logs)
    assert run.begin()[1].step == 2 and run.run_dir.identity() == run.facts["run_id"]


def test_a_trial_may_begin_at_the_checkpoint_of_another_with_other_settings(make_run):
    giver, heir = make_run("a", store=False), make_run("b", store=False, training={"learning_rate": 0.5})
    giver.begin()
    giver.save(2, b"handed over")
    commit_bytes(giver.run_dir.path / "run.yaml", dump_settings(giver.settings).encode())
    hand_over(
        giver.run_dir,
        heir.run_dir,
        step=2,
        stage="rationale",
        settings=heir.settings,
        names=["training.learning_rate"],
    )
    notes, found = heir.begin()
    assert (notes, found.step) == ([], 2) and heir.run_dir.identity() != giver.run_dir.identity()
    assert {name: found.manifest[name] for name in heir.facts} == heir.facts
    for key in heir.facts:
        other = {**PLAN, **heir.facts, key: "another"}
        with pytest.raises(CheckpointError, match=f"step-000002 was written with {key} = '{heir.facts[key]}'"):
            find_checkpoint(heir.checkpoints, facts=other, may_commit=lambda: None)
    with pytest.raises(CheckpointError, match="step-000002 was written with plan_fingerprint = 'p1'"):
        find_checkpoint(
            heir.checkpoints, facts={**PLAN, **heir.facts, "plan_fingerprint": "p2"}, may_commit=lambda: None
        )


# Stores of earlier versions: <name>-<settings>/<stage>, without facts


def older_store(run, step, state):
    """Put a checkpoint where earlier versions did; returns its folder and the local copy."""
    url = f"{run.settings.training.checkpoint_url}/{run.settings.run.name}-0123456789abcdef/{run.stage}"
    staging = run.run_dir.path / "staging"
    save_checkpoint(
        Engine(state), staging, step=step, facts={**PLAN, "probe_loss": 1.0}, keep=2, may_commit=lambda: None
    )
    name = f"step-{step:06d}"
    for file in ("state/weights.pt", "manifest.json"):
        put_file(staging / name / file, f"{url}/{name}/{file}")
    put_bytes(f"{name}\n".encode(), f"{url}/LATEST")
    return url, staging / name


def test_an_older_store_is_not_taken_up_by_an_empty_folder_and_this_is_said(make_run):
    run = make_run("a")
    url, _ = older_store(run, 4, b"whose?")
    (note,), found = run.begin()
    assert found is None and url in note and "not used" in note and f"copy the folder to {run.url}" in note
    run.save(2)
    assert run.begin()[0] == []


def test_an_older_store_is_taken_up_by_the_folder_that_wrote_it(make_run):
    run = make_run("a")
    _url, local = older_store(run, 2, b"two")
    shutil.copytree(local, run.checkpoints / "step-000002")
    commit_bytes(run.checkpoints / "LATEST", b"step-000002\n")
    older_store(run, 4, b"four")
    notes, found = run.begin()
    assert (
        found.step == 4 and run.state(4) == b"four" and len(notes) == 1 and "written by an earlier version" in notes[0]
    )


def test_a_folder_of_an_earlier_version_with_other_checkpoints_leaves_the_older_store_alone(make_run):
    run = make_run("a")
    _, local = older_store(run, 2, b"mine")
    shutil.copytree(local, run.checkpoints / "step-000002")
    commit_bytes(run.checkpoints / "LATEST", b"step-000002\n")
    older_store(run, 2, b"another's")
    older_store(run, 4, b"another's")
    notes, found = run.begin()
    assert found.step == 2 and run.state(2) == b"mine" and ["not used" in note for note in notes] == [True, False]


# The driver


def test_the_driver_takes_the_stores_id_before_mlflow_asks_for_one_and_hands_it_to_torchrun(
    make_run, monkeypatch, tmp_path
):
    from launcher.pipeline import attempt, pipeline

    class Log:
        def __getattr__(self, name):
            return lambda *values, **named: None

    class Tracker:
        parent = Log()
        step = staticmethod(lambda name: contextlib.nullcontext(Log()))

    @contextlib.contextmanager
    def asks_at_once(settings, run_dir, **named):
        run_dir.identity()
        yield Tracker()

    monkeypatch.setattr(attempt, "open_tracker", asks_at_once)
    first = make_run("a")
    first.begin()
    first.save(2)
    settings = with_settings(first.settings, run={"dir": str(tmp_path / "empty")})
    path = tmp_path / "job.json"
    run_dir = pipeline.run_pipeline(settings, until="train-rationale", write_job=path, report=lambda line: None)
    job = read_job(path)
    assert run_dir.identity() == first.facts["run_id"] and job.run_facts == first.facts
    older = {name: value for name, value in read_json(path).items() if name != "run_facts"}
    commit_json(path, older)
    assert read_job(path).run_facts is None
