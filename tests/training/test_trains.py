"""Trainings of two ranks in which a part of the model is frozen: LoRA under every ZeRO stage, and named parts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from forked_ranks import ForkedRanks
from safetensors.torch import load_file
from transformers import T5ForConditionalGeneration

from launcher.runs.exported import describe_export, verify_export
from launcher.runs.journal import JournalReader
from launcher.runs.run_dir import RunDir, RunError

pytestmark = pytest.mark.processes


def folder_of(job):
    return RunDir(Path(job.run_dir)).model("rationale")


def weights_of(job):
    return load_file(folder_of(job) / "model.safetensors")


def adapters_of(job):
    return load_file(folder_of(job) / "adapters" / "adapter_model.safetensors")


def points_of(job):
    return list(JournalReader(RunDir(Path(job.run_dir)).journal("rationale")).read())


def values_of(job, name):
    return {point["step"]: point["metrics"][name] for point in points_of(job) if name in point["metrics"]}


def start_of(job):
    return load_file(Path(job.settings.model.pretrained) / "model.safetensors")


def is_adapted(name):
    return name.endswith(("Attention.q.weight", "Attention.v.weight"))


def is_bridge(name):
    return name.startswith(("encoder.image_dense.", "encoder.mha_layer.", "encoder.gate_dense."))


@pytest.fixture(scope="module")
def forked():
    """Runs jobs one after the other in the same ranks, which start fast."""
    with ForkedRanks() as ranks:
        yield ranks.run_jobs


@pytest.fixture(scope="module")
def trained(make_job, forked):
    """Trainings that differ in their ZeRO stage, precision and trained parts."""
    jobs = {
        **{f"lora{stage}": make_job(f"lora{stage}", trains="lora", zero_stage=stage) for stage in (0, 1, 2, 3)},
        "bf16": make_job("lora-bf16-1", trains="lora", zero_stage=1, precision="bf16"),
        "named": make_job("named", trains=["decoder.block.1"], zero_stage=2),
    }
    return finished(forked, jobs)


@pytest.fixture(scope="module")
def more(make_job, forked):
    """Further ones, for long proofs."""
    jobs = {
        "bf16-2": make_job("lora-bf16-2", trains="lora", zero_stage=2, precision="bf16"),
        "bf16-3": make_job("lora-bf16-3", trains="lora", zero_stage=3, precision="bf16"),
        "activations": make_job("lora-activations", trains="lora", activation_checkpointing=True),
        "bridge": make_job("frozen", freeze_backbone=True, zero_stage=3),
    }
    return finished(forked, jobs)


def finished(forked, jobs, **options):
    result = forked(*jobs.values(), **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return jobs


def changed_in(job):
    """The names of exported weights that are not those of the start."""
    found, start = weights_of(job), start_of(job)
    assert found.keys() == start.keys()
    return {name for name in start if not torch.equal(found[name], start[name])}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_lora_computes_the_same_under_every_zero_stage(trained, stage):
    job, expected = trained[f"lora{stage}"], trained["lora1"]
    assert values_of(job, "loss") == pytest.approx(values_of(expected, "loss"), rel=1e-6)
    assert values_of(job, "grad_norm") == pytest.approx(values_of(expected, "grad_norm"), rel=1e-4)
    found = adapters_of(job)
    assert max((found[name] - value).abs().max() for name, value in adapters_of(expected).items()) < 1e-5


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_frozen_is_exported_bit_equal_and_what_is_trained_is_not(trained, stage):
    job = trained[f"lora{stage}"]
    assert changed_in(job) == {name for name in start_of(job) if is_adapted(name) or is_bridge(name)}


def test_named_parts_alone_are_trained(trained):
    begin = "decoder.block.1."
    assert changed_in(trained["named"]) == {name for name in start_of(trained["named"]) if name.startswith(begin)}


def test_in_bf16_frozen_weights_are_those_of_the_start_and_trained_ones_the_optimizers(trained):
    check_bf16(trained["bf16"], trained["lora1"])


@pytest.mark.long
def test_the_same_holds_under_zero_2_and_3_with_recomputed_activations_and_with_a_frozen_backbone(trained, more):
    for name in ("bf16-2", "bf16-3"):
        check_bf16(more[name], trained["lora1"])
    expected = adapters_of(trained["lora1"])
    assert all(torch.equal(value, expected[name]) for name, value in adapters_of(more["activations"]).items())
    assert changed_in(more["bridge"]) == set(filter(is_bridge, start_of(more["bridge"])))


def check_bf16(job, in_fp32):
    found, start = weights_of(job), start_of(job)
    assert {value.dtype for value in found.values()} == {torch.float32}
    frozen = [name for name in start if not is_adapted(name) and not is_bridge(name)]
    assert all(torch.equal(found[name], start[name]) for name in frozen)
    assert not any(torch.equal(value, value.bfloat16().float()) for value in adapters_of(job).values())
    assert values_of(job, "loss") == pytest.approx(values_of(in_fp32, "loss"), rel=2e-2)


@pytest.mark.parametrize("name", ["lora1", "lora3", "bf16"])
def test_the_exported_weights_are_the_start_with_the_adapters_that_lie_beside_them(trained, name):
    adapters, found, start = adapters_of(trained[name]), weights_of(trained[name]), start_of(trained[name])
    layers = sorted({key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in adapters})
    assert [f"{layer}.weight" for layer in layers] == sorted(filter(is_adapted, start))
    for layer in layers:
        down, up = (adapters[f"base_model.model.{layer}.lora_{side}.weight"] for side in "AB")
        base = start[f"{layer}.weight"]
        assert (found[f"{layer}.weight"] - (base + 2.0 * up @ down)).abs().max() < 1e-6 < up.abs().max()


def test_peft_opens_the_exported_adapters_on_the_model_they_started_from(trained):
    job = trained["lora2"]
    base = T5ForConditionalGeneration.from_pretrained(job.settings.model.pretrained)
    opened = peft.PeftModel.from_pretrained(base, folder_of(job) / "adapters").merge_and_unload().state_dict()
    found = weights_of(job)
    assert max((opened[name] - found[name]).abs().max() for name in filter(is_adapted, found)) < 1e-6


def test_every_file_of_the_adapters_is_in_what_is_verified_and_the_best_model_has_them_too(trained):
    job = trained["lora1"]
    outputs = describe_export("rationale", folder_of(job))
    names = {"adapters/adapter_config.json", "adapters/adapter_model.safetensors"}
    assert names <= outputs["files"].keys()
    best = RunDir(Path(job.run_dir)).best_model("rationale")
    assert all((best / name).is_file() for name in names)
    altered = outputs | {"files": outputs["files"] | {"adapters/adapter_config.json": "0" * 64}}
    with pytest.raises(RunError, match=r"adapters/adapter_config\.json is not the file that was exported"):
        verify_export(folder_of(job), altered, source="marker")


def test_the_start_says_how_many_parameters_are_trained_and_frozen(trained):
    lines = [point["note"] for point in points_of(trained["lora3"]) if "frozen" in point.get("note", "")]
    found = re.fullmatch(r"(.*) parameters, (.*) of them trained \((.*) in LoRA adapters\), (.*) frozen", lines[0])
    total, learned, adapters, frozen = (int(number.replace(",", "")) for number in found.groups())
    start = start_of(trained["lora3"])
    own = sum(value.numel() for name, value in start.items() if is_bridge(name))
    assert adapters == sum(value.numel() for value in adapters_of(trained["lora3"]).values())
    assert (learned, total - learned) == (own + adapters, frozen)


def check_killed(make_job, forked, expected, stage):
    job = make_job(f"lora-killed{stage}", trains="lora", zero_stage=stage)
    assert forked(job, die=(1, 5)).returncode != 0
    latest = RunDir(Path(job.run_dir)).checkpoints("rationale") / "LATEST"
    assert latest.read_text() in ("step-000002\n", "step-000004\n")
    finished(forked, {"killed": job})
    weights, adapters = weights_of(expected), adapters_of(expected)
    assert all(torch.equal(value, weights[name]) for name, value in weights_of(job).items())
    assert all(torch.equal(value, adapters[name]) for name, value in adapters_of(job).items())


def test_a_rank_killed_with_9_resumes_adapters_under_zero_2_to_bit_equal_weights(make_job, forked, trained):
    check_killed(make_job, forked, trained["lora2"], 2)


@pytest.mark.long
def test_a_rank_killed_with_9_resumes_adapters_under_zero_3_to_bit_equal_weights(make_job, forked, trained):
    check_killed(make_job, forked, trained["lora3"], 3)


@pytest.mark.long
def test_adapters_of_two_ranks_continue_with_one(make_job, forked, trained):
    jobs = {f"lora{stage}": make_job(f"lora-fewer{stage}", trains="lora", zero_stage=stage) for stage in (1, 2, 3)}
    for name, job in jobs.items():
        checkpoints = RunDir(Path(job.run_dir)).checkpoints("rationale")
        shutil.copytree(RunDir(Path(trained[name].run_dir)).checkpoints("rationale"), checkpoints)
        (checkpoints / "LATEST").write_text("step-000004\n")
    for name, job in finished(forked, jobs, world_size=1).items():
        assert any("converted to another number of workers" in point.get("note", "") for point in points_of(job))
        assert values_of(job, "loss") == pytest.approx({5: values_of(trained[name], "loss")[5]}, rel=1e-5)
        expected = weights_of(trained[name])
        assert max((value - expected[name]).abs().max() for name, value in weights_of(job).items()) < 1e-5
