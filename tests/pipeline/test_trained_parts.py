"""What is trained, by the settings: of a run, of a stage, of a chain; and what is refused before any work."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from launcher.config.chains import ANSWERS, CHAINS, Chain, Stage
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.pipeline.preflight import check_machine, check_settings
from launcher.training.identity import settings_content
from mmcot.errors import MissingPackageError

FROZEN = "training.freeze_backbone=true"
LORA = "training.trains=lora"


def settings(*overrides):
    return load_settings(preset="demo", overrides=overrides)


def trained(*overrides):
    """What the two stages train."""
    return [settings(*overrides).training_of(stage).trained for stage in ("rationale", "answer")]


@pytest.fixture
def pretrained(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 9, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path)
    return f"model.pretrained={tmp_path}"


def check(*overrides):
    given = settings(*overrides)
    check_settings(given)
    check_machine(given)


def test_a_stage_trains_what_it_says_and_else_what_the_training_says():
    assert trained() == ["all", "all"] and trained(FROZEN) == ["bridge", "bridge"]
    assert trained(LORA, "answer.trains=all") == ["lora", "all"]
    assert trained(FROZEN, "answer.trains=[decoder, lm_head]") == ["bridge", ["decoder", "lm_head"]]
    assert trained(FROZEN, "training.trains=bridge", "answer.trains=all") == ["bridge", "all"]


def test_a_chain_comes_between_its_stages_own_settings_and_those_of_the_training(monkeypatch):
    first = Stage("draft", "QCM-E", writes="drafts")
    last = Stage("answer", "QCMG-A", reads=("drafts",), starts_from="draft", trains="lora", writes=ANSWERS)
    monkeypatch.setitem(CHAINS, "adapt", Chain("adapt", "", (first, last)))
    base = ["run.chain=adapt", "stages.draft.num_steps=4"]
    assert settings(*base, "training.trains=[decoder]").training_of("answer").trained == "lora"
    assert settings(*base, "answer.trains=bridge").training_of("answer").trained == "bridge"
    check(*base)  # the draft trains all of a model of random weights, which the answer then adapts


def test_stages_that_train_different_parts_are_noticed():
    assert settings(LORA).stages_train_alike
    assert settings("answer.trains=lora", "rationale.trains=lora").stages_train_alike
    assert not settings("answer.trains=lora").stages_train_alike


def test_a_frozen_backbone_has_the_fingerprint_of_an_earlier_version():
    def content(*overrides):
        return settings(*overrides).model_dump(exclude_defaults=True)

    plain = content()
    assert content(FROZEN) == plain | {"training": plain["training"] | {"freeze_backbone": True}}
    assert settings_content(settings(LORA)) != settings_content(settings())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([FROZEN, LORA], "freeze_backbone trains the bridge alone, and trains is 'lora'; set one of them"),
        ([FROZEN, "training.trains=all"], "freeze_backbone trains the bridge alone, and trains is 'all'"),
        (["training.trains=[]"], r"training\.trains = \[\]: list should have at least 1 item"),
        (["answer.trains=bridge", "data.features=null"], "stage 'answer' trains the bridge alone, .* nothing to train"),
        ([LORA, "model.lora_rank=0"], r"model\.lora_rank"),
    ],
)
def test_settings_of_trained_parts_that_contradict_each_other_are_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        settings(*overrides)


@pytest.mark.parametrize("trains", ["bridge", "lora"])
def test_a_language_model_of_random_weights_is_not_frozen_unless_the_trained_parts_are_named(trains):
    with pytest.raises(SettingsError, match=rf"stage 'answer' trains {trains} and freezes .* set model\.pretrained"):
        check(f"answer.trains={trains}")
    check("training.trains=[encoder.image_dense, encoder.mha_layer, encoder.gate_dense]")
    check(FROZEN)  # as in earlier versions


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["answer.trains=[decoder.block.7]"],
            r"stage 'answer' .*'decoder\.block\.7' fits no parameter .* decoder\.block\.1",
        ),
        (["training.trains=[encoder.bridg]", "model.inject=embed", "model.resample=perceiver"], r"encoder\.bridge"),
        (["training.trains=loar"], "did you mean lora"),
        (["training.trains=[encoder.gate_dense]", "data.features=null"], "nothing to train without data.features"),
        (
            [LORA, "model.lora_targets=[q, wi_0]"],
            "'wi_0' is no linear layer of .*; it has k, o, q, v, wi, wo",
        ),
    ],
)
def test_names_that_are_not_in_the_model_are_refused_before_any_work(pretrained, overrides, message):
    with pytest.raises(SettingsError, match=message):
        check(*overrides, *([pretrained] if LORA in overrides else []))


def test_lora_is_for_text_too_and_for_a_start_from_media_tokens(pretrained):
    check(LORA, pretrained, "data.features=null")
    check(LORA, pretrained, "model.inject=embed", "model.resample=perceiver", "model.lora_targets=[q, k, v, o, wi, wo]")


def test_lora_without_peft_is_refused_before_any_work(pretrained, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'mmcot\[lora\]'"):
        check(LORA, pretrained)
