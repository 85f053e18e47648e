"""Commands of the published system, as typed: what they become, and what they write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from data_shards.atomic_files import read_json
from launcher.compat.published_commands import DEVIATIONS, parse_command
from launcher.compat.published_runs import run_reference
from launcher.evaluation.external_predictions import score_file

ROOT = Path(__file__).parents[2]
RATIONALE = (
    "main.py --model allenai/unifiedqa-t5-base --user_msg rationale --img_type detr --bs 8 --eval_bs 4 --eval_acc 10 "
    "--output_len 512 --final_eval --prompt_format QCM-E"
)
ANSWER = (
    "--model allenai/unifiedqa-t5-base --user_msg answer --img_type detr --bs 8 --eval_bs 4 --eval_acc 10 --output_len 64 --final_eval "
    "--prompt_format QCMG-A --eval_le experiments/r/predictions_ans_eval.json --test_le experiments/r/predictions_ans_test.json"
)
CAPTIONED = (
    "--data_root data/ScienceQA/data --caption_file data/instruct_captions.json --model declare-lab/flan-alpaca-base --user_msg rationale "
    "--img_type resnet --bs 16 --eval_bs 32 --epoch 1 --lr 5e-5 --output_len 512 --use_caption --use_generate --prompt_format QCM-E --output_dir experiments"
)


def test_the_command_that_trains_rationales_becomes_stage_one():
    run = parse_command(RATIONALE.split(), num_gpus=2)
    settings = run.settings
    assert (
        run.stage == "rationale"
        and str(run.folder) == "experiments/rationale_allenai-unifiedqa-t5-base_detr_QCM-E_lr5e-05_bs16_op512_ep20"
    )
    assert (
        settings.training.micro_batch_size,
        settings.training.global_batch_size,
        settings.cluster.num_workers,
        settings.cluster.use_gpu,
    ) == (8, 16, 2, True)
    assert (
        settings.rationale.num_epochs,
        settings.rationale.max_source_tokens,
        settings.rationale.max_target_tokens,
    ) == (20, 512, 512)
    assert (
        settings.training.learning_rate,
        settings.training.warmup_steps,
        settings.training.schedule,
        settings.run.seed,
    ) == (5e-5, 0, "linear", 42)
    assert (
        settings.data.path == "data/scienceqa"
        and settings.data.captions is None
        and settings.generation.batch_size == 4
    )


def test_the_command_that_trains_answers_takes_the_rationales_it_is_given():
    run = parse_command(ANSWER.split(), num_gpus=1)
    assert (run.settings.run.chain, run.settings.answer.format, run.settings.answer.rationale_source) == (
        "given-rationales",
        "QCMG-A",
        "gold",
    )
    assert {split: path.name for split, path in run.rationales.items()} == {
        "val": "predictions_ans_eval.json",
        "test": "predictions_ans_test.json",
    }
    assert "gold" in run.deviations and "leak" not in run.deviations


def test_without_given_rationales_stage_one_is_trained_first_instead_of_leaking_gold_ones():
    run = parse_command(["--model", "m", "--user_msg", "answer", "--prompt_format", "QCMG-A"], num_gpus=0)
    assert run.settings.run.chain == "two-stage" and run.stage == "answer" and "leak" in run.deviations


def test_captions_come_from_the_file_that_is_named():
    settings = parse_command(CAPTIONED.split(), num_gpus=0).settings
    assert (settings.data.captions, settings.data.use_caption, settings.data.path) == (
        "data/instruct_captions.json",
        True,
        "data/ScienceQA/data/scienceqa",
    )


@pytest.mark.parametrize(
    ("format", "chain"), [("QCM-A", "answer"), ("QCM-LEA", "reason-then-answer"), ("QCM-ALE", "answer-then-explain")]
)
def test_one_stage_formats_become_chains(format, chain):
    settings = parse_command(["--prompt_format", format, "--output_len", "512"], num_gpus=0).settings
    assert (settings.run.chain, settings.answer.format, settings.answer.max_target_tokens) == (chain, format, 512)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--bz 8", "unrecognized arguments: --bz 8"),
        ("--bs eight", "invalid int value: 'eight'"),
        ("--img_type dino", "invalid choice: 'dino'"),
        ("--prompt_format QCMG-A --eval_le a.json", "give both, or neither"),
        ("--prompt_format QCMG-A --evaluate_dir models/answer", "give --eval_le and --test_le"),
        ("--prompt_format QXM-A", "QXM-A"),
    ],
)
def test_a_command_that_cannot_be_is_refused(command, message):
    with pytest.raises(ValueError, match=message):
        parse_command(command.split(), num_gpus=0)


def test_every_deviation_stands_in_the_documentation():
    text = " ".join((ROOT / "docs" / "reference.md").read_text(encoding="utf-8").split())
    assert [name for name in DEVIATIONS if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def written(workplace, tiny_data, ray_up, tmp_path_factory):
    """Both stages as a user of the published system runs them, then an evaluation of what was trained; on a tiny T5."""
    folder = tmp_path_factory.mktemp("reference")
    shutil.copytree(next(workplace.glob("mini_sqa-source-*")), folder / "data" / "scienceqa")
    problems = read_json(folder / "data" / "scienceqa" / "problems.json")
    with_image = [qid for qid, record in problems.items() if record["image"]]
    (folder / "vision_features").mkdir()
    (folder / "vision_features" / "name_map.json").write_text(
        json.dumps({qid: str(row) for row, qid in enumerate(with_image)})
    )
    np.save(
        folder / "vision_features" / "detr.npy",
        np.random.default_rng(0).standard_normal((len(with_image), 100, 256)).astype(np.float32),
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_data.path / "tokenizer")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    common = "--model t5 --img_type detr --bs 16 --eval_bs 16 --epoch 1 --lr 1e-3 --input_len 128"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "")
        first = run_reference(
            parse_command(f"{common} --user_msg rationale --output_len 24 --prompt_format QCM-E".split(), num_gpus=0),
            report=said.append,
        )
        given = f"--eval_le {first}/predictions_ans_eval.json --test_le {first}/predictions_ans_test.json"
        answer = f"{common} --user_msg answer --output_len 12 --prompt_format QCMG-A {given}"
        second = run_reference(parse_command(answer.split(), num_gpus=0), report=said.append)
        before = (second / "predictions_ans_test.json").read_text()
        shutil.copytree(second, folder / "trained", ignore=shutil.ignore_patterns("mmcot*", "predictions*"))
        third = run_reference(parse_command(f"{answer} --evaluate_dir trained".split(), num_gpus=0), report=said.append)
    return folder, first, second, third, before, said


@pytest.mark.ray
def test_both_stages_write_the_files_of_the_published_system_where_it_writes_them(written):
    folder, first, second, _, before, _ = written
    assert str(first) == "experiments/rationale_t5_detr_QCM-E_lr0.001_bs16_op24_ep1"
    rationales, answers = (read_json(folder / path / "predictions_ans_test.json") for path in (first, second))
    assert [set(content) for content in (rationales, answers)] == [{"num_fail", "scores", "preds", "labels"}] * 2
    assert (
        set(read_json(folder / first / "predictions_ans_eval.json")) == {"preds", "labels"}
        and not (folder / second / "predictions_ans_eval.json").exists()
    )
    assert len(rationales["preds"]) == len(answers["preds"]) == 16 and answers["labels"][0].startswith(
        "The answer is ("
    )
    assert (folder / second / "model.safetensors").exists() and (folder / second / "tokenizer.json").exists()


@pytest.mark.ray
def test_the_answering_model_reads_the_rationales_it_was_given(written):
    folder, first, second, *_ = written
    preds = read_json(folder / first / "predictions_ans_test.json")["preds"]
    lines = [
        json.loads(line)
        for line in (folder / second / "mmcot" / "rationales" / "test" / "000000-000000.jsonl").read_text().splitlines()
    ]
    assert [line["rationale"] for line in lines] == preds


@pytest.mark.ray
def test_evaluating_the_trained_folder_gives_the_same_predictions(written):
    folder, _, _, third, before, _ = written
    assert str(third) == "trained" and read_json(folder / third / "predictions_ans_test.json") == json.loads(before)


@pytest.mark.ray
def test_the_predictions_are_scored_by_the_same_table(written):
    folder, _, second, *_ = written
    scored = score_file(folder / second / "predictions_ans_test.json", folder / "data" / "scienceqa")
    assert (
        f"{scored.report['accuracy']['AVG']:.2f}"
        == read_json(folder / second / "predictions_ans_test.json")["scores"]["answer"]["acc_average"]
    )


@pytest.mark.ray
def test_settings_and_deviations_are_shown(written):
    *_, said = written
    assert (
        any("answer.rationale_source = gold" in line for line in said)
        and sum(DEVIATIONS["padding"] in line for line in said) == 2
    )
