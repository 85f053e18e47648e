"""Settings of candidates: what is refused, and what generated texts depend on."""

from __future__ import annotations

import pytest

from launcher.config.loading import parse_settings
from launcher.config.settings import SettingsError
from launcher.generation.inputs import generation_inputs

STAGES = {"rationale": {"num_steps": 1, "max_target_tokens": 96}, "answer": {"num_steps": 1, "max_target_tokens": 16}}


def settings_with(chain="two-stage", **generation):
    return parse_settings({"run": {"chain": chain}, **STAGES, "generation": generation})


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"candidates": 4}, r"candidates \(4\) without sampling are all the same text; set generation.temperature"),
        ({"search": "vote", "temperature": 1}, "search vote needs several candidates, and generation.candidates is 1"),
        ({"min_new_tokens": 16}, r"min_new_tokens \(16\) .* stage 'answer' .* below answer.max_target_tokens \(16\)"),
        ({"min_p": 1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_what_to_do(generation, message):
    with pytest.raises(SettingsError, match=message):
        settings_with(**generation)


def test_the_least_length_is_compared_with_the_stages_of_the_chain_alone():
    with pytest.raises(SettingsError, match="stage 'answer'"):
        settings_with("answer", min_new_tokens=90)
    values = {"run": {"chain": "answer"}, **STAGES, "generation": {"min_new_tokens": 90}}
    values["answer"] = {"num_steps": 1, "max_target_tokens": 120}
    values["rationale"] = {"num_steps": 1, "max_target_tokens": 20}
    assert parse_settings(values).generation.min_new_tokens == 90


def test_folders_of_texts_written_before_these_settings_existed_continue():
    assert set(generation_inputs(settings_with())) == {"batch_size", "task_samples", "precision"}
    sampled = generation_inputs(settings_with(temperature=0.7))
    assert set(sampled) == {"batch_size", "task_samples", "precision", "temperature", "top_p", "seed"}


def test_texts_depend_on_every_setting_that_changes_them():
    greedy = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 2}
    drawn = {"top_k": 5, "min_p": 0.1, "candidates": 4, "search": "vote"}
    assert generation_inputs(settings_with(**greedy)).items() >= greedy.items()
    inputs = generation_inputs(settings_with(temperature=1, **greedy, **drawn))
    assert inputs.items() >= (greedy | drawn).items()


def test_what_only_sampling_uses_changes_nothing_without_it():
    assert generation_inputs(settings_with(top_k=5, min_p=0.1, top_p=0.9)) == generation_inputs(settings_with())
