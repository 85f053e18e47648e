"""Stages as values: what a chain refuses, and the settings of its stages."""

from __future__ import annotations

import pytest

from launcher.config.chains import ANSWERS, CHAINS, Chain, Stage
from launcher.config.extensions import ExtensionError, load_extensions
from launcher.config.loading import dump_settings, load_settings, parse_settings
from launcher.config.settings import SettingsError
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.run_settings import read_run_settings, write_or_verify_settings
from launcher.tuning.space import with_values

DRAFT = Stage("draft", "QCM-E", writes="drafts")
ANSWER = Stage("answer", "QCMG-A", reads=("drafts",), writes=ANSWERS)


IMPORTS = "from launcher.config.chains import ANSWERS, Chain, Stage\nSTAGE = Stage('a', 'QCM-A', writes=ANSWERS)"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((ANSWER,), "reads 'drafts', which no earlier stage writes; there is none"),
        ((DRAFT, Stage("answer", "QCM-A", starts_from="later", writes=ANSWERS)), "starts from 'later'.*'draft'"),
        (
            (DRAFT, Stage("answer", "QCM-A", trains="half", writes=ANSWERS)),
            "trains .half.; expected one of all",
        ),
        ((DRAFT, Stage("draft", "QCM-A", writes=ANSWERS)), "used once"),
        ((Stage("logs", "QCM-A", writes=ANSWERS),), "none of"),
        ((Stage("draft", "QCM-E", writes="draft"), Stage("answer", "QCM-A", writes=ANSWERS)), "'draft' is no name"),
        ((Stage("draft", "QCM-E", writes="../logs"), Stage("answer", "QCM-A", writes=ANSWERS)), "'../logs' is no name"),
        ((DRAFT, Stage("answer", "QCM-A", writes="texts")), "'predictions' for the last stage alone"),
        ((Stage("answer", "QCM-X", writes=ANSWERS),), "QCM-X.*did you mean"),
        ((DRAFT, Stage("answer", "QCM-A", reads=("drafts",), writes=ANSWERS)), "reads 'drafts', .* has no G"),
        ((Stage("answer", "QCMG-A", writes=ANSWERS),), "reads no text, .* has a G"),
        ((DRAFT, Stage("answer", "QCMG-A", reads="drafts", writes=ANSWERS)), "written with a comma"),
        (DRAFT, "written with a comma"),
        ((), "has no stage"),
        ((Stage("predictions", "QCM-E", writes="drafts"), ANSWER), "'predictions' is no name"),
        ((Stage("draft", "QCM-E", writes="train-answer"), ANSWER), "'train-answer' is no name"),
        ((Stage("tuning", "QCM-E", writes="drafts"), ANSWER), "'tuning' is no name"),
        ((Stage("evaluate-test", "QCM-E", writes="drafts"), ANSWER), "'evaluate-test' is no name"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_by_name(stages, message):
    with pytest.raises(ValueError, match=message):
        Chain("mine", "", stages)


def test_a_last_stage_that_writes_nothing_has_no_evaluation():
    chain = Chain("match", "", (Stage("match", "QCM-E"),))
    assert chain.steps == ("data", "train-match") and chain.answering is None and chain.writing == ()


@pytest.fixture
def draft_chain(monkeypatch):
    last = Stage("answer", "QCMG-A", reads=("drafts",), starts_from="draft", trains="bridge", writes=ANSWERS)
    monkeypatch.setitem(CHAINS, "draft-first", Chain("draft-first", "", (DRAFT, last)))
    return ["run.chain=draft-first", "stages.draft.num_steps=4"]


def test_a_stage_has_its_own_batch_learning_rate_start_and_trained_parts(draft_chain):
    own = ["stages.draft.learning_rate=0.5", "stages.draft.global_batch_size=6", "stages.draft.micro_batch_size=3"]
    settings = load_settings(preset="demo", overrides=[*draft_chain, *own])
    draft, answer = settings.of_stage("draft"), settings.of_stage("answer", start="runs/demo/draft/model")
    assert (draft.training.learning_rate, draft.training.global_batch_size, draft.model.pretrained) == (0.5, 6, None)
    assert answer.training.freeze_backbone and answer.model.pretrained == "runs/demo/draft/model"
    assert settings.stage("draft").format == "QCM-E" and parse_settings(settings.model_dump()) == settings
    assert "draft" in dump_settings(settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.other.num_steps=1"], r"stages.other is no stage of run.chain draft-first; it has draft, answer"),
        (["stages.draft.num_steps=null"], "exactly one of num_steps and num_epochs"),
        (["stages.draft.global_batch_size=5", "stages.draft.micro_batch_size=2"], "multiple of micro_batch_size"),
        (["stages.draft.format=QCMG-E"], "draft.format QCMG-E does not go with run.chain draft-first"),
    ],
)
def test_settings_of_stages_that_do_not_fit_are_refused(draft_chain, overrides, message):
    with pytest.raises(SettingsError, match=message):
        load_settings(preset="demo", overrides=[*draft_chain, *overrides])


def test_a_stage_without_settings_is_named(draft_chain):
    with pytest.raises(SettingsError, match=r"stage 'draft' are missing .*stages\.draft\.num_steps"):
        load_settings(preset="demo", overrides=draft_chain[:1])


def test_the_old_sections_and_the_new_ones_are_the_same():
    new = load_settings(preset="demo", overrides=["stages.answer.num_steps=7"])
    assert new == load_settings(preset="demo", overrides=["answer.num_steps=7"]) and new.stages == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "offers nothing"),
        ("CHAINS = [1]", "CHAINS is a list, expected a dict"),
        (f"{IMPORTS}\nCHAINS = {{'answer': Chain('answer', '', (STAGE,))}}", "'answer', which exists already"),
        (f"{IMPORTS}\nCHAINS = {{'new': Chain('other', '', (STAGE,))}}", "named 'other'; give both the same name"),
        ("CHAINS = {'new': 1}", "expected a Chain of launcher.config.chains"),
        ("METRICS = {'m': lambda text, references: 1.0}", "expected a Metric of mmcot.metrics.table"),
        ("FORMS = {'f': 3}", "expected a Form"),
        ("ENCODERS = {'e': 3}", "expected a Encoder"),
        ("from torch import nn\nBRIDGES = {'b': nn.Linear}", "expected a subclass of Bridge"),
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_an_extension_that_offers_nothing_new_is_refused(tmp_path, monkeypatch, content, message):
    name = f"extension_{abs(hash(content))}"
    (tmp_path / f"{name}.py").write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ExtensionError, match=message):
        load_extensions([name])


def test_an_extension_is_never_taken_from_the_folder_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "in_a_run.py").write_text("CHAINS = {'new': 1}", encoding="utf-8")
    for name in ("run.yaml", "lock.json"):
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingsError, match="in the folder of a run"):
        load_settings(preset="demo", overrides=["extensions=[in_a_run]"])
    with pytest.raises(ExtensionError, match="no module on the Python path"):
        load_extensions(["not_there"])


def test_a_run_goes_on_with_a_changed_extension_and_says_so_and_readers_take_that_one(tmp_path, monkeypatch):
    module = tmp_path / "parts" / "changing_parts.py"
    module.parent.mkdir()
    module.write_text(f"{IMPORTS}\nCHAINS = {{'changing': Chain('changing', '', (STAGE,))}}", encoding="utf-8")
    monkeypatch.syspath_prepend(module.parent)
    sets = ["extensions=[changing_parts]", "run.chain=changing", "stages.a.num_steps=1"]
    settings, run_dir = load_settings(preset="demo", overrides=sets), RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    assert write_or_verify_settings(run_dir, settings) == [] == write_or_verify_settings(run_dir, settings)
    module.write_text(module.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="last used another extension 'changing_parts'.*mmcot run"):
        read_run_settings(run_dir.path)
    (note,) = write_or_verify_settings(run_dir, settings)
    assert "'changing_parts' has changed" in note and write_or_verify_settings(run_dir, settings) == []
    assert read_run_settings(run_dir.path) == settings
    with pytest.raises(SettingsError, match="extensions was .'changing_parts'. and is now"):
        write_or_verify_settings(run_dir, load_settings(preset="demo"))
    del CHAINS["changing"]  # other tests of this process look at all chains


def test_one_text_alone_can_be_given_to_a_run():
    with pytest.raises(ValueError, match="one text can be given"):
        Chain("mine", "", (Stage("answer", "QCMG-A", reads=("a", "b"), writes=ANSWERS),), given=("a", "b"))


def test_an_arm_may_have_another_chain_than_the_tuning_whose_stages_are_its_own(draft_chain):
    space = "tuning.space={run.chain: {grid: [two-stage, draft-first]}}"
    sets = ["run.chain=draft-first", "stages.draft.num_steps=1", "stages.draft.format=QCM-LE", space]
    settings = load_settings(preset="demo", overrides=sets)
    assert with_values(settings, {"run.chain": "two-stage"}).stages == {}
    assert with_values(settings, {"run.chain": "draft-first"}).stage("draft").format == "QCM-LE"
