"""Trainings whose pictures are media tokens, on real DeepSpeed ranks over gloo, as the published fusion trains."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from forked_ranks import ForkedRanks
from safetensors.torch import load_file

from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir
from launcher.stages.build_model import build_model
from launcher.stages.samples import load_tokenizer, open_stage

pytestmark = pytest.mark.processes

PLACES = ["embed", "layers"]
TRAININGS = [(1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


def with_media(job, inject):
    """The same job with pictures as media tokens, around a frozen language model.

    It starts from a saved model that has the new parts, because ZeRO-3 draws new parts in another order.
    """
    settings = job.settings
    media = {"inject": inject, "resample": "perceiver", "media_tokens": 3}
    update = {
        "model": settings.model.model_copy(update=media),
        "training": settings.training.model_copy(update={"freeze_backbone": True, "learning_rate": 1e-2}),
    }
    settings = settings.model_copy(update=update)
    start = Path(job.run_dir).parent / f"start-{inject}"
    if not start.exists():
        tokenizer = load_tokenizer(settings, job.shards_dir)
        samples = open_stage(settings, "rationale", "train", shards_dir=job.shards_dir, tokenizer=tokenizer, texts={})
        build_model(settings, samples).save_pretrained(start)
        tokenizer.save_pretrained(start)
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"pretrained": str(start)})})
    return dataclasses.replace(job, settings=settings)


@pytest.fixture(scope="module")
def forked():
    """Runs jobs one after the other in the same ranks."""
    with ForkedRanks() as ranks:
        yield ranks.run_jobs


@pytest.fixture(scope="module")
def together(make_job, forked):
    """A training of two ranks for each place, ZeRO stage and precision; and of one rank."""
    two = {
        (inject, stage, precision): with_media(
            make_job(f"media-{inject}-{stage}-{precision}", zero_stage=stage, precision=precision), inject
        )
        for inject in PLACES
        for stage, precision in TRAININGS
    }
    one = {(inject, "alone"): with_media(make_job(f"media-{inject}-alone"), inject) for inject in PLACES}
    for jobs, world_size in ((two, 2), (one, 1)):
        result = forked(*jobs.values(), world_size=world_size)
        assert result.returncode == 0, result.stderr[-3000:]
    return two | one


def points_of(job):
    return [point["metrics"] for point in JournalReader(RunDir(Path(job.run_dir)).journal("rationale")).read()]


def losses(job):
    return [point["loss"] for point in points_of(job) if "loss" in point]


def weights_of(job):
    return load_file(RunDir(Path(job.run_dir)).model("rationale") / "model.safetensors")


def is_new(name):
    return name.startswith("encoder.bridge.") or ".gated." in name


@pytest.mark.parametrize("inject", PLACES)
@pytest.mark.parametrize(("stage", "precision"), TRAININGS[1:])
def test_every_zero_stage_computes_the_same_losses(together, inject, stage, precision):
    expected = pytest.approx(losses(together[inject, 1, "fp32"]), rel=1e-5 if precision == "fp32" else 0.02)
    assert losses(together[inject, stage, precision]) == expected


@pytest.mark.parametrize("inject", PLACES)
def test_one_rank_computes_the_losses_of_two(together, inject):
    assert losses(together[inject, "alone"]) == pytest.approx(losses(together[inject, 1, "fp32"]), rel=1e-5)


@pytest.mark.parametrize("inject", PLACES)
@pytest.mark.parametrize(("stage", "precision"), TRAININGS)
def test_the_frozen_language_model_stays_bit_equal_and_the_bridge_learns(together, inject, stage, precision):
    job = together[inject, stage, precision]
    start, trained = load_file(Path(job.settings.model.pretrained) / "model.safetensors"), weights_of(job)
    frozen = [name for name in trained if not is_new(name)]
    assert len(frozen) > 40 and all(torch.equal(trained[name], start[name]) for name in frozen)
    alone = weights_of(together[inject, 1, "fp32"])
    assert trained.keys() == alone.keys() and any(is_new(name) for name in trained)
    gates = [trained[name] for name in trained if name.endswith("gate.scale")]
    assert all(gate.item() != 0.0 for gate in gates) and len(gates) == (6 if inject == "layers" else 0)
    assert losses(job)[-1] < losses(job)[0]


@pytest.mark.parametrize("inject", PLACES)
def test_a_rank_killed_with_9_resumes_to_bit_equal_weights(make_job, forked, together, inject):
    job = with_media(make_job(f"media-{inject}-killed"), inject)
    assert forked(job, world_size=2, die=(1, 3)).returncode != 0
    assert forked(job, world_size=2).returncode == 0
    weights, expected = weights_of(job), weights_of(together[inject, 1, "fp32"])
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_openings_of_the_gates_are_among_the_points_of_the_journal(together):
    names = {name for point in points_of(together["layers", 1, "fp32"]) for name in point}
    assert {"attention_gate_0", "feed_forward_gate_2"} <= names


@pytest.mark.parametrize("inject", PLACES)
def test_checkpoints_of_two_ranks_go_on_with_one(make_job, forked, together, inject):
    job = with_media(make_job(f"media-{inject}-fewer", zero_stage=2), inject)
    assert forked(job, world_size=2, die=(1, 3)).returncode != 0
    result = forked(job, world_size=1)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(job)[-1] == pytest.approx(losses(together[inject, 1, "fp32"])[-1], rel=1e-4)
    start, trained = load_file(Path(job.settings.model.pretrained) / "model.safetensors"), weights_of(job)
    assert all(torch.equal(trained[name], start[name]) for name in trained if not is_new(name))
