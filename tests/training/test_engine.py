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


# The configuration of the Hugging Face Trainer's documentation for ZeRO-3, with "auto" wherever the Trainer fills in.
OF_THE_TRAINER = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def test_the_trainers_configuration_is_used_but_for_what_it_names_that_is_ours(tmp_path):
    path, theirs = tmp_path / "ds.json", dict(OF_THE_TRAINER)
    for name in ("optimizer", "scheduler"):
        path.write_text(json.dumps(theirs))
        with pytest.raises(SettingsError, match=rf"training\.deepspeed sets {name}; .*; leave it out there"):
            deepspeed_config(training(f"deepspeed={path}", "zero_stage=3"), world_size=2)
        del theirs[name]
    path.write_text(json.dumps(theirs))
    config = deepspeed_config(training(f"deepspeed={path}", "zero_stage=3"), world_size=2)
    assert "auto" not in json.dumps(config) and "fp16" not in config
    assert config["zero_optimization"]["sub_group_size"] == 1e9 and config["train_batch_size"] == 32


@pytest.mark.parametrize("name", ["zero_optimization", "bf16", "data_types"])
def test_a_section_of_deepspeed_that_is_no_object_is_refused_and_auto_means_ours(name):
    wrong = training("zero_stage=1").model_copy(update={"deepspeed": {name: True}})
    with pytest.raises(SettingsError, match=f"sets {name} = True, expected an object"):
        deepspeed_config(wrong, world_size=2)
    ours = training("zero_stage=1")
    auto = ours.model_copy(update={"deepspeed": {name: "auto"}})
    assert deepspeed_config(auto, world_size=2) == deepspeed_config(ours, world_size=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bf16": {}, "bf16": {}}', r"ds\.json: the key 'bf16' occurs more than once"),
        ('{"a": NaN}', r"ds\.json: NaN is no value of JSON"),
        ('{\n"a": 1,}', r"ds\.json, line 2: no valid JSON"),
        ("", r"ds\.json: no valid JSON"),
        ("[" * 100_000, r"ds\.json: objects and lists are nested too deeply"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested more than 50 levels deep"),
        ('{"a": 1' + "0" * 400 + "}", "the number is too large"),
    ],
)
def test_a_json_that_is_broken_or_would_lose_something_is_named(tmp_path, text, message):
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_deepspeed(str(tmp_path / "ds.json"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_json_with_a_mark_before_its_text_is_read(tmp_path, encoding):
    (tmp_path / "ds.json").write_bytes('{"steps_per_print": 5}'.encode(encoding))
    assert read_deepspeed(str(tmp_path / "ds.json")) == {"steps_per_print": 5}


def test_a_json_that_is_not_there_or_no_object_is_named(tmp_path):
    with pytest.raises(SettingsError, match="none.json does not exist"):
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
