"""Chains: what is trained in which order, and what the answering model reads and writes."""

from __future__ import annotations

import pytest

from launcher.config.chains import CHAINS, MATCHING, Chain, Stage
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from mmcot.texts.answers import split_reasons
from mmcot.texts.sample import Sample

PROBLEM = Sample(
    qid="1", question="Hot?", choices=("yes", "no"), answer=1, lecture="Fire is hot.", solution="Ice is cold."
)


def settings_of(chain, *overrides):
    given = {
        "given-rationales": ["answer.rationales=written"],
        "match-first": ["stages.match.num_steps=1"],
        "align-first": ["stages.align.num_steps=1"],
    }.get(chain, [])
    return load_settings(
        preset="demo", overrides=[f"run.chain={chain}", "answer.max_target_tokens=128", *given, *overrides]
    )


def test_each_chain_has_its_steps_and_the_format_of_the_paper():
    assert settings_of("two-stage").chain.steps == (
        "data",
        "train-rationale",
        "rationales",
        "train-answer",
        "evaluate",
    )
    assert settings_of("answer").chain.steps == ("data", "train-answer", "evaluate")
    assert settings_of("given-rationales").chain.steps == ("data", "rationales", "train-answer", "evaluate")
    formats = {name: settings_of(name).answer.format for name in CHAINS}
    assert formats == {
        "two-stage": "QCMG-A",
        "given-rationales": "QCMG-A",
        "answer": "QCM-A",
        "reason-then-answer": "QCM-LEA",
        "answer-then-explain": "QCM-ALE",
        "match-first": "QCM-EA",
        "align-first": "QCM-EA",
    }
    assert settings_of("reason-then-answer", "answer.format=QCM-EA").answer.format == "QCM-EA"


def test_a_format_that_does_not_go_with_the_chain_is_refused():
    with pytest.raises(SettingsError, match="use QCM-A"):
        settings_of("answer", "answer.format=QCMG-A")
    assert settings_of("two-stage", "answer.format=QCM-A").answer.format == "QCM-A"  # runs of that kind stand
    with pytest.raises(SettingsError, match="belong together"):
        settings_of("two-stage", "answer.rationales=written")
    with pytest.raises(SettingsError, match="would cut off the reasons"):
        settings_of("reason-then-answer", "answer.max_target_tokens=16")
    with pytest.raises(SettingsError, match=r"run\.chain"):
        settings_of("three-stage")


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("Fire is hot. The answer is (B).", "Fire is hot."),
        ("The answer is (B). BECAUSE: Fire is hot.", "Fire is hot."),
        ("The answer is (B).", ""),
        ("nothing to be read", "nothing to be read"),
    ],
)
def test_reasons_are_read_out_of_a_text_that_answers_too(text, reasons):
    assert split_reasons(text) == reasons


def test_reasons_are_held_against_what_the_model_has_learned():
    gold = {name: settings_of(name).gold_reasons(PROBLEM) for name in CHAINS}
    assert gold == {
        "two-stage": "Solution: Ice is cold.",
        "given-rationales": "Solution: Ice is cold.",
        "answer": None,
        "reason-then-answer": "Fire is hot. Ice is cold.",
        "answer-then-explain": "Fire is hot. Ice is cold.",
        "match-first": "Ice is cold.",
        "align-first": "Ice is cold.",
    }


def test_all_chains_share_one_data_folder_but_that_of_captions():
    from launcher.data.fingerprints import tokenizer_formats

    formats = {name: tuple(tokenizer_formats(settings_of(name))) for name in CHAINS}
    assert formats.pop("match-first") == formats.pop("align-first") == ("V-C", "QCM-EA")
    assert set(formats.values()) == {("QCM-E", "QCMG-A")}


def test_the_chain_that_matches_first_trains_the_bridge_alone_in_both_stages():
    settings = settings_of("match-first", "training.group_by_length=true")
    assert settings.chain.steps == ("data", "train-match", "train-answer", "evaluate")
    match, answer = (settings.training_of(name) for name in settings.chain.stage_names)
    assert match.freeze_backbone and answer.freeze_backbone
    assert not match.group_by_length and answer.group_by_length
    assert settings.of_stage("answer", start="match/model").model.pretrained == "match/model"
    assert settings_of("match-first", "model.pretrained=t5-small").of_stage("match").model.pretrained == "t5-small"


def test_the_chain_that_aligns_first_trains_the_bridge_on_captions_and_then_all_unless_the_stage_says_otherwise():
    settings = settings_of("align-first")
    assert settings.chain.steps == ("data", "train-align", "train-answer", "evaluate")
    assert [settings.training_of(name).trained for name in settings.chain.stage_names] == ["bridge", "all"]
    lora = settings_of("align-first", "answer.trains=lora")
    assert [lora.training_of(name).trained for name in lora.chain.stage_names] == ["bridge", "lora"]


@pytest.mark.parametrize("wrong", [{"trains": "all"}, {"trains": "bridge", "writes": "notes"}])
def test_a_stage_that_matches_trains_the_bridge_and_writes_nothing(wrong):
    with pytest.raises(ValueError, match="trains the bridge alone and writes no text"):
        Chain("own", "V↔C", (Stage("match", "V-C", objective=MATCHING, **wrong), Stage("answer", "QCM-A")))


def test_stages_train_alike_only_where_each_trains_the_same():
    same = settings_of("two-stage", "training.trains=lora", "model.pretrained=t5-small")
    other = settings_of("two-stage", "training.trains=lora", "answer.trains=all", "model.pretrained=t5-small")
    assert same.stages_train_alike and not other.stages_train_alike
