"""Matching pictures and texts on real DeepSpeed ranks: the loss depends on neither ranks nor ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from forked_ranks import ForkedRanks
from safetensors.torch import load_file

from data_shards.atomic_files import commit_json
from launcher.config.loading import load_settings
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.stages.jobs import TrainJob
from launcher.stages.samples import load_tokenizer
from launcher.stages.token_lengths import LengthsOf, cached_lengths

pytestmark = pytest.mark.processes

TINY = [
    *("run.chain=match-first", "stages.match.num_steps=3", "stages.match.max_target_tokens=32"),
    *("answer.max_target_tokens=96", "cluster.use_gpu=false", "training.schedule=constant"),
    *("model.inject=embed", "model.resample=qformer", "model.media_tokens=4", "model.projection_width=8"),
    *("model.shape.d_model=16", "model.shape.num_layers=1", "training.log_every=1", "training.validate_every=3"),
    *("training.micro_batch_size=8", "training.global_batch_size=24", "training.checkpoint_every=2"),
]
# 24 questions are 3 blocks: two ranks have a dummy block
RUNS = {"one": (1, 0), "two": (2, 0), "sharded": (2, 3), "resumed": (2, 0)}  # ranks, ZeRO stage


@pytest.fixture(scope="module")
def runs(tiny_data, workplace):
    """The folder of each run, after three steps."""
    folders = {}
    with ForkedRanks() as ranks:
        for name, (world_size, zero_stage) in RUNS.items():
            settings = load_settings(preset="demo", overrides=[*TINY, f"training.zero_stage={zero_stage}"])
            settings = settings.of_stage("match")
            lengths = {}
            for split in ("train", "val"):
                key = LengthsOf(settings, "match", split, str(tiny_data.path), {})
                inputs = {"matching": split}
                lengths[split] = str(cached_lengths(key, key.open(), workplace / "lengths", inputs))
            folder = folders[name] = workplace / "matchings" / name
            shutil.rmtree(folder, ignore_errors=True)
            commit_json(folder / "lock.json", {"attempt": 1})
            job = TrainJob("match", settings, str(folder), str(tiny_data.path), lengths, num_steps=3, attempt=1)
            commit_json(folder / "job.json", job.to_json())
            if name == "resumed":
                assert ranks.run([folder / "job.json"], world_size=2, die=(1, 3)).returncode != 0
            result = ranks.run([folder / "job.json"], world_size=world_size)
            assert result.returncode == 0, result.stderr
    return folders


def metrics(folder: Path, *beginnings: str) -> dict[tuple[int, str], float]:
    """The last value of each metric with such a beginning, by step and name."""
    points = JournalReader(RunDir(folder).journal("match")).read()
    return {
        (point["step"], name): value
        for point in points
        for name, value in point["metrics"].items()
        if name.startswith(beginnings)
    }


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_losses_and_retrieval_depend_on_neither_ranks_nor_zero_stage(runs, name):
    expected = metrics(runs["one"], "loss", "validation_loss", "retrieval")
    assert metrics(runs[name], "loss", "validation_loss", "retrieval") == pytest.approx(expected, rel=2e-4)
    assert {key for _, key in expected} > {"loss_contrastive", "loss_matching", "loss_generation", "retrieval_at_1"}
    assert expected[3, "retrieval_texts"] > 4 and 0 <= expected[3, "retrieval_at_1"] <= 1


def test_a_resume_draws_the_same_negatives(runs):
    assert metrics(runs["resumed"], "loss", "validation_loss", "retrieval") == metrics(
        runs["two"], "loss", "validation_loss", "retrieval"
    )


def test_the_temperature_and_pairs_without_a_negative_are_logged(runs):
    watched = metrics(runs["two"], "temperature", "pairs_without_negative")
    assert len(watched) == 6 and watched[1, "temperature"] == pytest.approx(0.07)


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_the_language_model_is_not_changed_and_the_bridge_is(runs, name):
    from launcher.stages.build_model import build_model
    from launcher.stages.samples import open_stage

    settings = load_settings(preset="demo", overrides=TINY).of_stage("match")
    shards = next(iter(runs.values())).parents[1] / "shards"
    samples = open_stage(settings, "match", "train", shards_dir=shards, tokenizer=load_tokenizer(settings, shards))
    start = build_model(settings, samples, objective="matching").state_dict()
    trained = load_file(RunDir(runs[name]).model("match") / "model.safetensors")
    changed = {
        key.split(".")[1 if key.startswith("encoder") else 0]
        for key, value in trained.items()
        if not value.equal(start[key])
    }
    assert changed == {"bridge", "matching"}
