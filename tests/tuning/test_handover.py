"""Population-based training hands a checkpoint over: to the right trial, by name, once, and people read of it."""

from __future__ import annotations

import os

import pytest

from data_shards.atomic_files import commit_bytes, commit_json, read_json
from data_shards.sealed_json import broken_seal, commit_sealed
from launcher.config.loading import dump_settings
from launcher.runs.checkpoint_names import CheckpointError
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.tracking.descriptions import TAG, describe_parent
from launcher.training.identity import settings_content
from launcher.tuning.handover import hand_over
from launcher.tuning.ray_tune import _watch_trials
from launcher.tuning.trial import TrialJob, _folder_of_trial, has_checkpoint, trial_settings

NAME = "training.learning_rate"


class Population:
    """The folder of a tuning with one trial, which has checkpoints of two steps."""

    def __init__(self, folder, settings):
        tuning = settings.tuning.model_copy(
            update={"scheduler": "pbt", "space": {NAME: {"uniform": [0.1, 0.9]}}, "stage": "rationale"}
        )
        self.settings = settings.model_copy(update={"tuning": tuning})
        self.folder = folder
        self.job = TrialJob(self.settings, str(folder), "parent", os.getcwd())
        self.giver = RunDir(folder / "trials" / "a_0")
        own = self.settings_of(self.giver, 0.1)
        commit_bytes(self.giver.path / "run.yaml", dump_settings(own).encode())
        for step in (10, 20):
            place = self.giver.checkpoints("rationale") / f"step-{step:06d}"
            commit_bytes(place / "state" / "weights.pt", b"weights")
            commit_sealed(
                place / "manifest.json",
                {
                    "step": step,
                    "plan_fingerprint": "p1",
                    "run_id": self.giver.identity(),
                    "settings_fingerprint": settings_content(own),
                    "data_fingerprint": "d1",
                    "best": {"folder": "best-000010-0"},
                },
            )
        commit_bytes(self.giver.checkpoints("rationale") / "LATEST", b"step-000020\n")

    def settings_of(self, run_dir, rate):
        return trial_settings(self.settings, {NAME: rate}, run_dir)

    def manifest(self, run_dir, step=10):
        return run_dir.checkpoints("rationale") / f"step-{step:06d}" / "manifest.json"

    def hand_over(self, heir, rate=0.2, step=10):
        return hand_over(
            self.giver, heir, step=step, stage="rationale", settings=self.settings_of(heir, rate), names=[NAME]
        )

    def folder_of(self, values, trial="a_0", step=10, own="b_0"):
        """The folder that a trial works in when Ray Tune passes the checkpoint of another."""
        from ray.tune import Checkpoint

        note = self.folder / "note"
        commit_json(note / "checkpoint.json", {"trial": trial, "step": step})
        return _folder_of_trial(self.job, own, Checkpoint.from_directory(note), values)


@pytest.fixture
def population(tmp_path, tiny_settings):
    return Population(tmp_path / "tuning", tiny_settings)


def test_a_checkpoint_is_handed_over_whole_as_the_latest_with_the_id_and_settings_of_its_new_trial(population):
    heir = RunDir(population.folder / "trials" / "b_0-from-a_0-10-x")
    population.hand_over(heir)
    folder, manifest = heir.checkpoints("rationale"), read_json(population.manifest(heir))
    assert has_checkpoint(folder, 10) and not has_checkpoint(folder, 20)
    assert (folder / "LATEST").read_text() == "step-000010\n"
    assert (folder / "step-000010" / "state" / "weights.pt").read_bytes() == b"weights"
    given = read_json(population.manifest(population.giver))
    assert manifest["run_id"] == heir.identity() != given["run_id"]
    assert manifest["settings_fingerprint"] == settings_content(population.settings_of(heir, 0.2))
    assert manifest["settings_fingerprint"] != given["settings_fingerprint"]
    kept = {name: manifest[name] for name in ("step", "plan_fingerprint", "data_fingerprint")}
    assert kept == {"step": 10, "plan_fingerprint": "p1", "data_fingerprint": "d1"}
    assert broken_seal(manifest) is None and "fingerprint" in manifest and "best" not in manifest
    assert manifest["handed_over_by"] == {
        "trial": "a_0",
        "step": 10,
        "changed": {NAME: [0.1, 0.2]},
        "run_id": given["run_id"],
        "settings_fingerprint": given["settings_fingerprint"],
    }


def test_who_gave_what_to_whom_is_one_sentence_in_journal_file_and_mlflow(population):
    heir = RunDir(population.folder / "trials" / "b_0-from-a_0-10-x")
    note = population.hand_over(heir, rate=0.25)
    assert note == (
        "the checkpoint of trial a_0 at step 10 was handed to trial b_0-from-a_0-10-x, with training.learning_rate "
        "0.25 instead of 0.1"
    )
    assert [point["note"] for point in JournalReader(heir.journal("rationale")).read()] == [note]
    assert read_json(heir.handed_over)["note"] == note
    tags = describe_parent(population.settings, heir)
    assert tags[TAG].startswith(f"{note}.") and tags["handed_over.trial"] == "a_0" and tags["handed_over.step"] == "10"
    assert describe_parent(population.settings, population.giver).keys() == {TAG}
    assert population.hand_over(RunDir(heir.path.with_name("c_0")), rate=0.1).endswith("with the same settings")


def test_the_command_says_every_new_hand_over_once(population):
    said = []
    population.hand_over(RunDir(population.folder / "trials" / "b_0-from-a_0-10-x"))
    watch = _watch_trials(RunDir(population.folder), said.append, is_saved_in=population.folder)
    watch.on_step_end(0, [])
    assert said == []  # it was said before the tuning was interrupted
    note = population.hand_over(RunDir(population.folder / "trials" / "b_0-from-a_0-20-x"), step=20)
    watch.on_step_end(1, [])
    watch.on_step_end(2, [])
    assert said == [f"  {note}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": "another"}, "step-000010 was written with run_id = 'another', trial a_0 has"),
        ({"settings_fingerprint": "another"}, "step-000010 was written with settings_fingerprint = 'another'"),
        ({"step": 20}, "step-000010 was written with step = 20, trial a_0 has 10"),
    ],
)
def test_a_checkpoint_that_the_trial_did_not_write_is_handed_to_no_other(population, change, message):
    path, heir = population.manifest(population.giver), RunDir(population.folder / "trials" / "b_0")
    commit_sealed(path, read_json(path) | change)
    with pytest.raises(CheckpointError, match=message):
        population.hand_over(heir)
    assert not heir.checkpoints("rationale").exists() and not heir.handed_over.exists()


def test_an_altered_manifest_is_not_sealed_again(population):
    path = population.manifest(population.giver)
    commit_json(path, read_json(path) | {"plan_fingerprint": "altered"})
    with pytest.raises(CheckpointError, match="it was altered; no trial can continue from it"):
        population.hand_over(RunDir(population.folder / "trials" / "b_0"))


def test_a_checkpoint_of_an_earlier_version_gets_the_id_and_settings_too(population):
    path, heir = population.manifest(population.giver), RunDir(population.folder / "trials" / "b_0")
    commit_json(path, {"step": 10, "plan_fingerprint": "p1"})
    population.hand_over(heir)
    manifest = read_json(population.manifest(heir))
    assert manifest["run_id"] == heir.identity() and broken_seal(manifest) is None
    assert manifest["handed_over_by"] == {"trial": "a_0", "step": 10, "changed": {NAME: [0.1, 0.2]}}


def test_a_trial_finds_its_folder_again_and_the_same_step_with_other_values_is_another(population):
    first = population.folder_of({NAME: 0.2})
    written = population.manifest(first).stat().st_mtime_ns
    assert population.folder_of({NAME: 0.2}) == first and population.manifest(first).stat().st_mtime_ns == written
    other = population.folder_of({NAME: 0.3})
    assert first.path.name.startswith("b_0-from-a_0-10-") and other != first
    assert population.folder_of({NAME: 0.3}, trial=other.path.name) == other  # its own: the tuning was interrupted
    assert (other.path / "logs" / "trial.log").read_text().startswith("the checkpoint of trial a_0 at step 10")


def test_names_do_not_grow_with_the_number_of_exchanges(population):
    giver, length = population.giver, 0
    for number in range(30):
        heir = population.folder_of({NAME: 0.2 + number / 100}, trial=giver.path.name, own=f"{'bc'[number % 2]}_0")
        commit_bytes(heir.path / "run.yaml", dump_settings(population.settings_of(heir, 0.2 + number / 100)).encode())
        giver, length = heir, max(length, len(heir.path.name))
    assert length < 40
