"""Engine settings: a user's own DeepSpeed JSON is laid over ours and may not contradict our arithmetic."""

from __future__ import annotations

import itertools
import json
import os
import time

import pytest

from launcher.config.loading import load_settings, read_deepspeed
from launcher.config.settings import SettingsError
from launcher.pipeline.preflight import check_settings
from launcher.pipeline.training_job import check_patience
from launcher.training.compile_locks import clear_compile_locks
from launcher.training.deepspeed_engine import deepspeed_config
from launcher.training.schedule import learning_rate


def training(*overrides):
    return load_settings(preset="demo", overrides=[f"training.{override}" for override in overrides]).training


def test_a_users_json_is_laid_over_ours_and_auto_means_ours(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": "auto", "allgather_bucket_size": 1e6},
                "train_batch_size": "auto",
                "comms_logger": {"enabled": True},
            }
        )
    )
    config = deepspeed_config(training(f"deepspeed={path}", "zero_stage=1"), world_size=3)
    assert config["zero_optimization"]["allgather_bucket_size"] == 1e6 and config["zero_optimization"]["stage"] == 1
    assert config["train_batch_size"] == 48 and config["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            {"train_batch_size": 7},
            r"sets train_batch_size = 7, training.micro_batch_size times the number of workers makes it 32",
        ),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4, training.global_batch_size"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3, training.zero_stage makes it 1"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True, training.precision makes it False"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer; the optimizer is AdamW"),
        ({"fp16": {"enabled": True}}, "T5 overflows fp16"),
    ],
)
def test_what_contradicts_our_arithmetic_is_refused(theirs, message):
    settings = training("zero_stage=1").model_copy(update={"deepspeed": theirs})
    with pytest.raises(SettingsError, match=message):
        deepspeed_config(settings, world_size=2)


def test_a_json_that_is_not_there_or_no_object_is_named(tmp_path):
    with pytest.raises(SettingsError, match="No such file"):
        read_deepspeed(str(tmp_path / "none.json"))
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SettingsError, match="holds a list, expected a JSON object"):
        read_deepspeed(str(tmp_path / "list.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["offload=cpu", "zero_stage=0"], "offload needs a zero_stage of 1, 2 or 3"),
        (["profile_steps=[10, 10]"], r"profile_steps \[10, 10\] has no step"),
        (["offload=nvme", "zero_stage=3"], "offload=nvme needs zero_stage 3 and a folder in nvme_dir"),
    ],
)
def test_an_offload_that_cannot_be_is_refused(overrides, message):
    with pytest.raises(SettingsError, match=message):
        training(*overrides)


def test_an_early_end_that_could_never_come_is_refused_before_any_work():
    settings = load_settings(
        preset="demo", overrides=["training.early_stopping_patience=3", "training.validate_every=400"]
    )
    with pytest.raises(SettingsError, match=r"patience 3 cannot end stage 'rationale' early: it takes 4 validations"):
        check_settings(settings)
    check_patience(training("early_stopping_patience=3", "validate_every=100"), "rationale", 400)


def test_fewer_workers_than_the_least_are_refused():
    with pytest.raises(SettingsError, match=r"min_workers \(3\) must be at most num_workers \(2\)"):
        load_settings(preset="demo", overrides=["cluster.min_workers=3"])


def test_offload_and_stage_3_move_optimizer_and_weights():
    config = deepspeed_config(training("offload=cpu", "zero_stage=3"), world_size=2)["zero_optimization"]
    assert config["offload_optimizer"]["device"] == config["offload_param"]["device"] == "cpu"
    assert "offload_param" not in deepspeed_config(training("offload=cpu"), world_size=2)["zero_optimization"]


@pytest.mark.parametrize(("schedule", "half_way"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_every_schedule_warms_up_and_never_rises_after(schedule, half_way):
    settings = training(f"schedule={schedule}", "learning_rate=1.0", "warmup_steps=10", "final_lr_fraction=0.1")
    rates = [learning_rate(step, training=settings, total_steps=110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[60] == pytest.approx(half_way) and rates[110] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_a_compile_lock_left_by_a_kill_is_cleared_and_a_fresh_one_is_not(tmp_path):
    stale, fresh = tmp_path / "py311_cpu" / "cpu_adam" / "lock", tmp_path / "py311_cpu" / "async_io" / "lock"
    for path in (stale, fresh):
        path.parent.mkdir(parents=True)
        path.touch()
    os.utime(stale, (time.time() - 3600,) * 2)
    assert clear_compile_locks(tmp_path) == [stale] and fresh.exists() and not stale.exists()
