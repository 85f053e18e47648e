"""The ZeRO stage that a run chooses, and keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from data_shards.atomic_files import commit_json
from data_shards.stream import Step
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.pipeline.preflight import check_machine
from launcher.runs.run_dir import RunDir
from launcher.runs.run_settings import keep_zero_stage, write_or_verify_settings
from launcher.stages.samples import Block
from launcher.training import host_memory, loop, zero_stage
from launcher.training.deepspeed_engine import deepspeed_config
from launcher.training.identity import settings_content
from launcher.training.step_checks import TrainingError, full_memory_explained
from mmcot.models.trained_parts import ParameterCounts

GB = 10**9


def training(*overrides):
    return load_settings(preset="demo", overrides=[f"training.{override}" for override in overrides]).training


def all_of(number):
    return ParameterCounts(total=number, trained=number)


@pytest.mark.parametrize(
    ("overrides", "parameters", "ranks", "memory", "stage"),
    [
        ([], 250e6, 1, 24 * GB, 0),  # 5 GB of 12
        ([], 800e6, 1, 24 * GB, 3),  # one rank shards nothing, so nothing fits
        ([], 800e6, 4, 24 * GB, 1),  # 9.6 GB
        ([], 1500e6, 8, 24 * GB, 2),  # 15 GB, 9 GB
        ([], 2900e6, 8, 24 * GB, 3),
        (["precision=bf16"], 250e6, 1, 24 * GB, 1),  # never 0
        (["precision=bf16"], 2900e6, 8, 80 * GB, 1),  # 27.6 GB
        (["precision=bf16"], 2900e6, 8, 40 * GB, 2),
        (["offload=cpu"], 250e6, 1, 24 * GB, 1),  # stage 0 has nothing to move
        (["offload=nvme", "nvme_dir=/tmp"], 250e6, 1, 24 * GB, 3),
        (["deepspeed={zero_optimization: {stage: 2}}"], 250e6, 1, 24 * GB, 2),
        (["deepspeed={zero_optimization: {stage: auto}}"], 250e6, 1, 24 * GB, 0),
    ],
)
def test_the_stage_that_shards_least_and_fits_is_chosen(overrides, parameters, ranks, memory, stage):
    found, reason = zero_stage.choose_stage(
        training(*overrides),
        counts=all_of(int(parameters)),
        world_size=ranks,
        memory=memory,
    )
    assert found == stage and reason


def test_frozen_parameters_need_memory_for_their_weights_alone():
    counts = ParameterCounts(total=800_000_000, trained=3_000_000)

    def choose(precision, ranks, memory):
        settings = training(f"precision={precision}")
        return zero_stage.choose_stage(settings, counts=counts, world_size=ranks, memory=memory)

    stage, reason = choose("fp32", 1, 24 * GB)  # 3.2 GB, and 0.06 of what is trained
    assert stage == 0 and "800,000,000 parameters (797,000,000 of them frozen) in fp32 take 3.2 GB" in reason
    assert choose("fp32", 4, 4 * GB)[0] == 3 and "0.8 GB" in choose("fp32", 4, 4 * GB)[1]
    assert choose("bf16", 1, 4 * GB)[0] == 1 and "1.7 GB" in choose("bf16", 1, 4 * GB)[1]


def test_the_first_decision_stands_at_any_later_number_of_ranks_and_a_checkpoint_has_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_stage, "gather_json", lambda value: [value])
    monkeypatch.setattr(zero_stage, "agreed", lambda compute: compute())
    monkeypatch.setattr(zero_stage, "_memory_of_rank", lambda: 24 * GB)

    def decide(run_dir, ranks):
        found, note = zero_stage.with_zero_stage(
            training(),
            run_dir,
            "rationale",
            world_size=ranks,
            count_parameters=lambda: all_of(800_000_000),
        )
        return found.zero_stage, note

    run_dir = RunDir(tmp_path / "run")
    stage, note = decide(run_dir, 4)
    assert stage == 1 and "9.6 GB on each of 4 ranks, of 24.0 GB; stage 0 would take 16.0 GB" in note
    assert decide(run_dir, 1) == (1, None)

    fetched = RunDir(tmp_path / "fetched")
    commit_json(fetched.checkpoints("rationale") / "step-000004" / "manifest.json", {"zero_stage": 2})
    (fetched.checkpoints("rationale") / "LATEST").write_text("step-000004\n")
    assert decide(fetched, 4) == (2, None)


def test_a_stage_that_is_set_is_not_decided(tmp_path):
    settings = training("zero_stage=2")
    assert zero_stage.with_zero_stage(
        settings, RunDir(tmp_path), "rationale", world_size=1, count_parameters=lambda: pytest.fail("counted")
    ) == (settings, None)


def test_a_run_that_was_started_with_a_stage_keeps_it_where_it_is_left_open_now(tmp_path):
    earlier = load_settings(preset="demo", overrides=[f"run.dir={tmp_path}", "training.zero_stage=1"])
    write_or_verify_settings(RunDir(tmp_path), earlier)
    now = keep_zero_stage(RunDir(tmp_path), load_settings(preset="demo", overrides=[f"run.dir={tmp_path}"]))
    assert now.training.zero_stage == 1
    write_or_verify_settings(RunDir(tmp_path), now)
    with pytest.raises(SettingsError, match=r"training\.zero_stage was 1 and is now 3"):
        write_or_verify_settings(
            RunDir(tmp_path),
            load_settings(preset="demo", overrides=[f"run.dir={tmp_path}", "training.zero_stage=3"]),
        )


def test_the_earlier_default_is_in_no_fingerprint_as_in_the_earlier_version():
    contents = {
        stage: settings_content(load_settings(preset="demo", overrides=[f"training.zero_stage={stage}"]))
        for stage in ("auto", 1, 2)
    }
    assert contents["auto"] == contents[2] != contents[1]


def test_the_users_json_may_name_the_stage_that_is_left_open():
    settings = training("deepspeed={zero_optimization: {stage: 3}}")
    assert deepspeed_config(settings, world_size=2)["zero_optimization"]["stage"] == 3
    with pytest.raises(SettingsError, match=r"zero_optimization\.stage = 3, training\.zero_stage makes it 1"):
        deepspeed_config(settings.model_copy(update={"zero_stage": 1}), world_size=2)


def test_the_longest_block_of_the_epoch_comes_first_on_a_gpu_as_a_dummy():
    own = SimpleNamespace(qids=("a",))
    step = Step(0, [(0, own)])
    stream = SimpleNamespace(
        plan=lambda epoch: SimpleNamespace(longest_block=lambda: [4, 2]),
        samples=SimpleNamespace(load_block=lambda samples, is_dummy: (samples, is_dummy)),
    )

    def first(use_gpu):
        job = SimpleNamespace(settings=SimpleNamespace(cluster=SimpleNamespace(use_gpu=use_gpu)))
        return loop._with_longest(SimpleNamespace(job=job, streams={"train": stream}), step).blocks

    assert first(True) == [(1, ([4, 2], True)), (0, own)]
    assert first(False) == [(0, own)]


def test_a_full_gpu_is_a_sentence_with_what_needs_less():
    block = Block({"input_ids": torch.zeros(8, 512), "labels": torch.zeros(8, 96)}, ("a",) * 8)
    with pytest.raises(TrainingError) as raised, full_memory_explained(Step(3, [(0, block)])):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert "step 3: the GPU's memory is full; the largest block of the step has 8 questions of 512 + 96 tokens" in str(
        raised.value
    )
    assert "max_tokens_per_block below 4,864" in str(raised.value) and "more" not in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["precision=bf16"], r"zero_optimization\.stage = 0: zero_stage 0 keeps no fp32 copy of bf16 weights"),
        (["offload=cpu"], r"zero_optimization\.stage = 0: offload needs a zero_stage of 1, 2 or 3"),
    ],
)
def test_a_stage_in_the_users_json_that_cannot_be_is_refused_before_any_work(overrides, message):
    settings = load_settings(
        preset="demo",
        overrides=[
            "training.deepspeed={zero_optimization: {stage: 0}}",
            *(f"training.{override}" for override in overrides),
        ],
    )
    with pytest.raises(SettingsError, match=message):
        check_machine(settings)


def test_offload_of_a_run_that_has_chosen_to_shard_nothing_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zero_stage, "gather_json", lambda value: [value])
    monkeypatch.setattr(zero_stage, "agreed", lambda compute: compute())
    monkeypatch.setattr(zero_stage, "_memory_of_rank", lambda: 24 * GB)
    commit_json(RunDir(tmp_path).zero_stage, {"zero_stage": 0, "reason": "it fits"})
    with pytest.raises(SettingsError, match=r"has ZeRO stage 0, which shards nothing that training.offload=cpu"):
        zero_stage.with_zero_stage(
            training("offload=cpu"),
            RunDir(tmp_path),
            "rationale",
            world_size=1,
            count_parameters=lambda: all_of(1),
        )


def test_the_users_json_may_repeat_the_clipping_at_every_stage():
    for stage, clipped in (("auto", 1.0), (0, 0.0), (1, 1.0)):
        settings = training("deepspeed={gradient_clipping: 1.0}", "clip_norm=1.0", f"zero_stage={stage}")
        assert deepspeed_config(settings, world_size=2)["gradient_clipping"] == clipped


def test_the_memory_of_a_container_is_its_limit(tmp_path, monkeypatch):
    whole = host_memory.total_bytes()
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert host_memory.total_bytes() >= whole  # no limit
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("400000000\n")
    assert host_memory.total_bytes() == 2_000_000_000
    assert host_memory.free_bytes() == 1_600_000_000 - host_memory.KEPT_FREE_BYTES
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory.total_bytes() >= whole
