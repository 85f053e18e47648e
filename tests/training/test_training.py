"""The training loop on real DeepSpeed ranks over gloo, started without Ray."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import ForkedRanks
from safetensors.torch import load_file

from data_shards.atomic_files import commit_json, read_json
from data_shards.manifest import manifest_shards, read_problems
from data_shards.remote_files import list_names, put_bytes, read_file
from data_shards.writer import write_feature_shards
from launcher.runs.journal import Journal, JournalReader
from launcher.runs.run_dir import RunDir
from launcher.training.checkpoint_store import checkpoint_store

pytestmark = pytest.mark.processes


def written(jobs):
    """The files of jobs."""
    paths = [Path(job.run_dir) / "job.json" for job in jobs]
    for path, job in zip(paths, jobs, strict=True):
        commit_json(path, job.to_json())
    return paths


def torchrun(*jobs, world_size, die=()):
    """Run jobs one after the other in the same ranks, which torchrun starts."""
    paths = written(jobs)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port", "0"]
    command += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
        str(Path(__file__).parents[1] / "helpers" / "rank.py"),
    ]
    command += ["--die", *map(str, die)] if die else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.run([*command, *map(str, paths)], env=environment, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def forked():
    """Runs jobs one after the other in the same ranks, which start fast."""
    with ForkedRanks() as ranks:
        yield ranks.run_jobs


@pytest.fixture(scope="module")
def trained(forked):
    """Trains a job to its end; returns the weights."""

    def train(job):
        result = forked(job, world_size=2)
        assert result.returncode == 0, result.stderr[-3000:]
        return weights_of(job)

    return train


def weights_of(job):
    return load_file(RunDir(Path(job.run_dir)).model("rationale") / "model.safetensors")


def points_of(job):
    return list(JournalReader(RunDir(Path(job.run_dir)).journal("rationale")).read())


def losses(job):
    return {point["step"]: point["metrics"]["loss"] for point in points_of(job) if "loss" in point["metrics"]}


def norms(job):
    return {point["step"]: point["metrics"]["grad_norm"] for point in points_of(job) if "loss" in point["metrics"]}


def assert_equal_weights(job, expected_job):
    weights, expected = weights_of(job), weights_of(expected_job)
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)


def from_s3(job, s3, cache_dir):
    data = job.settings.data.model_copy(update={"remote": "ranges", "cache_dir": str(cache_dir)})
    return dataclasses.replace(job, shards_dir=s3, settings=job.settings.model_copy(update={"data": data}))


def from_random_weights(job):
    """The same job on a model of random weights, with its attention started by distance."""
    model = job.settings.model.model_copy(update={"pretrained": None})
    assert model.shape.near_bias
    return dataclasses.replace(job, settings=job.settings.model_copy(update={"model": model}), num_steps=1)


@pytest.fixture(scope="module")
def together(make_job, forked, s3, corrected_data, tmp_path_factory):
    """Trainings of two ranks that differ in what must not matter, one after the other in the same processes."""
    jobs = {
        "undisturbed": make_job("undisturbed"),
        **{f"zero{stage}": make_job(f"zero{stage}", zero_stage=stage) for stage in ("auto", 0, 2, 3)},
        "activations": make_job("activations", activation_checkpointing=True, offload="cpu", profile_steps=(1, 3)),
        "s3": from_s3(
            make_job("s3", loader_processes=2, checkpoint_url="s3://bucket/checkpoints"),
            s3,
            tmp_path_factory.mktemp("cache"),
        ),
        # The same name, settings and store as the one before; its plan is the same too.
        "corrected": dataclasses.replace(
            make_job("corrected", checkpoint_url="s3://bucket/checkpoints"), shards_dir=str(corrected_data.path)
        ),
        **{f"bf16-{stage}": make_job(f"bf16-{stage}", zero_stage=stage, precision="bf16") for stage in (1, 2, 3)},
        "early": dataclasses.replace(
            make_job("early", learning_rate=5.0, schedule="constant", early_stopping_patience=1, export="best"),
            num_steps=40,
        ),
        **{f"random{stage}": from_random_weights(make_job(f"random{stage}", zero_stage=stage)) for stage in (1, 2, 3)},
    }
    result = forked(*jobs.values(), world_size=2)
    assert result.returncode == 0, result.stderr[-3000:]
    return jobs


@pytest.fixture(scope="module")
def undisturbed(together):
    return together["undisturbed"]


def test_a_rank_killed_with_9_resumes_to_bit_equal_weights(make_job, forked, trained, undisturbed):
    job = make_job("killed")
    for step in (2, 3, 5):  # before a checkpoint is begun, while it is written or later, before the last one
        assert forked(job, world_size=2, die=(1, step)).returncode != 0
        latest = RunDir(Path(job.run_dir)).checkpoints("rationale") / "LATEST"
        assert not latest.exists() or latest.read_text() in ("step-000002\n", "step-000004\n")
    trained(job)
    assert_equal_weights(job, undisturbed)
    assert losses(job) == losses(undisturbed)  # some steps were computed twice, alike


def test_a_store_that_refuses_one_rank_is_said_and_the_next_checkpoint_goes_there(make_job, forked, s3, undisturbed):
    job = make_job("away", checkpoint_url="s3://bucket/away")
    assert forked(job, world_size=2, die=(1, "away-000002")).returncode == 0
    assert_equal_weights(job, undisturbed)
    notes = [point["note"] for point in points_of(job) if "note" in point]
    said = next(number for number, note in enumerate(notes) if "step 2 is on disk and not in the object store" in note)
    assert "could not be written in 5 tries" in notes[said]
    assert any("the object store has the checkpoint of step 4 again" in note for note in notes[said:])
    manifest = read_json(RunDir(Path(job.run_dir)).checkpoints("rationale") / "step-000005" / "manifest.json")
    assert read_file(f"{checkpoint_store(job.settings, 'rationale', manifest)}/LATEST") == b"step-000005\n"


@pytest.mark.long
def test_ranks_killed_in_every_phase_of_a_checkpoint_resume_to_bit_equal_weights(make_job, forked, s3, undisturbed):
    job = make_job("phases", checkpoint_url="s3://bucket/phases")
    run_dir = RunDir(Path(job.run_dir))
    checkpoints, store = run_dir.checkpoints("rationale"), None
    deaths = [(1, "copying"), (0, "writing"), (0, "committing"), (0, "moving")]
    for number, death in enumerate([*deaths, (1, "uploading"), (0, "best"), (0, "manifest"), (0, "latest")]):
        assert forked(job, world_size=2, die=death).returncode != 0, death
        assert (checkpoints / "LATEST").exists() == (number >= len(deaths)), death
        if manifests := sorted(checkpoints.glob("step-*/manifest.json")):
            store = checkpoint_store(job.settings, "rationale", read_json(manifests[0]))
            # What was published before a kill stands, and nothing of the checkpoint in flight.
            published = read_file(f"{store}/LATEST") if "LATEST" in list_names(store) else b"none\n"
            assert published in ((b"none\n",) if death[1] == "uploading" else (b"none\n", b"step-000002\n")), death
    assert forked(job, world_size=2).returncode == 0
    assert_equal_weights(job, undisturbed)
    assert losses(job) == losses(undisturbed)
    names = list_names(store)
    assert names[0] == "LATEST" and names[-1] == "step-000005" and any(name.startswith("best-000005") for name in names)
    best = load_file(run_dir.best_model("rationale") / "model.safetensors")
    for folder in (checkpoints, run_dir.best_model("rationale"), run_dir.model("rationale")):
        shutil.rmtree(folder)  # the next machine starts empty
    assert forked(job, world_size=2).returncode == 0
    assert_equal_weights(job, undisturbed)
    fetched = load_file(run_dir.best_model("rationale") / "model.safetensors")
    assert all(torch.equal(fetched[name], tensor) for name, tensor in best.items())
    assert not any("does not hold the model" in point.get("note", "") for point in points_of(job))


def test_a_training_from_s3_through_two_loader_processes_is_the_one_from_local_shards(together, undisturbed):
    assert_equal_weights(together["s3"], undisturbed)
    read = [point["metrics"]["gigabytes_read"] for point in points_of(together["s3"]) if "loss" in point["metrics"]]
    assert 0 < read[0] <= read[-1]


def test_a_run_with_corrected_texts_trains_though_the_store_holds_a_whole_training_of_the_texts_before(together):
    assert losses(together["corrected"]).keys() == {1, 2, 3, 4, 5}
    weights, before = weights_of(together["corrected"]), weights_of(together["s3"])
    assert any((weights[name] != before[name]).any() for name in before)


def test_the_trace_of_the_profiled_steps_opens_in_perfetto(together):
    for rank in (0, 1):
        path = RunDir(Path(together["activations"].run_dir)).logs / f"rationale-rank{rank}-trace.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert any("aten::" in event.get("name", "") for event in events)


def test_computing_activations_again_and_offloading_change_nothing(together, undisturbed):
    assert losses(together["activations"]) == pytest.approx(losses(undisturbed), rel=1e-6)


def test_one_rank_under_torchrun_computes_the_losses_and_weights_of_two(make_job, undisturbed):
    # Three blocks a batch: with two ranks one of them runs a dummy block at each step.
    job = make_job("alone")
    result = torchrun(job, world_size=1)
    assert result.returncode == 0, result.stderr[-3000:]
    weights = weights_of(job)
    expected = weights_of(undisturbed)
    assert losses(job) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


@pytest.mark.long
def test_checkpoints_of_two_ranks_go_on_with_one_and_say_so_and_one_in_s3_with_none_here(
    make_job, forked, together, undisturbed
):
    jobs = []
    for name in ("undisturbed", "zero3"):
        jobs.append(make_job(f"fewer-{name}", zero_stage=together[name].settings.training.zero_stage))
        checkpoints = RunDir(Path(jobs[-1].run_dir)).checkpoints("rationale")
        shutil.copytree(RunDir(Path(together[name].run_dir)).checkpoints("rationale"), checkpoints)
        (checkpoints / "LATEST").write_text("step-000004\n")
        jobs[-1] = dataclasses.replace(jobs[-1], num_steps=8)
    steady = [
        dataclasses.replace(
            make_job(f"steady-{job.settings.training.zero_stage}", zero_stage=job.settings.training.zero_stage),
            num_steps=8,
        )
        for job in jobs
    ]
    for job, other in zip(steady, jobs, strict=True):
        shutil.copytree(
            RunDir(Path(other.run_dir)).checkpoints("rationale"), RunDir(Path(job.run_dir)).checkpoints("rationale")
        )
    restored = make_job("restored", checkpoint_url="s3://bucket/checkpoints")
    facts = read_json(RunDir(Path(together["s3"].run_dir)).checkpoints("rationale") / "step-000005" / "manifest.json")
    store = checkpoint_store(restored.settings, "rationale", facts)
    names = list_names(store)
    assert [name for name in names if not name.startswith("best-")] == ["LATEST", "step-000004", "step-000005"]
    put_bytes(b"step-000004\n", f"{store}/LATEST")
    for group, world_size in ((jobs, 1), ([*steady, restored], 2)):
        result = forked(*group, world_size=world_size)
        assert result.returncode == 0, result.stderr[-3000:]
    for job, expected in zip(jobs, steady, strict=True):
        assert losses(job).keys() == {5, 6, 7, 8} and losses(job) == pytest.approx(losses(expected), rel=1e-5)
        assert any(
            "step-000004 is converted to another number of workers" in point.get("note", "") for point in points_of(job)
        )
    assert not [point["note"] for point in points_of(restored) if "does not hold" in point.get("note", "")]
    assert losses(restored).keys() == {5} and RunDir(Path(restored.run_dir)).identity() == facts["run_id"]
    assert_equal_weights(restored, undisturbed)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_computes_the_same_losses_and_norms_and_exports_the_whole_model(together, undisturbed, stage):
    weights, expected = weights_of(together[f"zero{stage}"]), weights_of(undisturbed)
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in expected.items()}
    assert losses(together[f"zero{stage}"]) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert norms(together[f"zero{stage}"]) == pytest.approx(norms(undisturbed), rel=1e-4)


def test_an_open_zero_stage_is_decided_once_and_told(together):
    job = together["zeroauto"]
    decided = read_json(RunDir(Path(job.run_dir)).zero_stage)
    assert decided["zero_stage"] == 0 and re.match(r"[\d,]+ parameters in fp32 take 0\.\d GB", decided["reason"])
    assert [point["note"] for point in points_of(job) if "ZeRO" in point.get("note", "")] == [
        f"ZeRO stage 0: {decided['reason']}"
    ]
    assert_equal_weights(job, together["zero0"])


def test_every_stage_starts_from_the_same_random_weights_with_attention_started_by_distance(together):
    first = {stage: losses(together[f"random{stage}"])[1] for stage in (1, 2, 3)}
    assert first[2] == pytest.approx(first[1], rel=1e-6) and first[3] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_training_in_bf16_exports_the_fp32_weights_of_its_optimizer(together, undisturbed, stage):
    job, weights, expected = together[f"bf16-{stage}"], weights_of(together[f"bf16-{stage}"]), weights_of(undisturbed)
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in expected.items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    assert read_json(RunDir(Path(job.run_dir)).model("rationale") / "config.json")["dtype"] == "float32"
    assert losses(job) == pytest.approx(losses(undisturbed), rel=2e-2)


def test_a_training_that_gets_no_better_ends_and_exports_its_best_model_and_does_nothing_when_started_again(
    together, forked
):
    job = together["early"]
    run_dir, measured = RunDir(Path(job.run_dir)), {}
    for point in points_of(job):
        if "validation_loss" in point["metrics"]:
            measured[point["step"]] = point["metrics"]["validation_loss"]
    best, last = min(measured, key=lambda step: measured[step]), max(measured)
    assert last == best + 1 < job.num_steps and measured[last] >= measured[best]
    facts = read_json(run_dir.best_model("rationale") / "mmcot.json")
    assert (facts["step"], facts["validation_loss"]) == (best, measured[best])
    kept = load_file(run_dir.best_model("rationale") / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights_of(job).items())
    assert any("because the validation loss was not below" in point.get("note", "") for point in points_of(job))
    shutil.rmtree(run_dir.model("rationale"))  # killed after its last checkpoint, before its model was exported
    result = forked(job, world_size=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert max(losses(job)) == last and all(torch.equal(kept[name], tensor) for name, tensor in weights_of(job).items())
    shutil.rmtree(run_dir.best_model("rationale"))  # as on a machine that has only the store's checkpoints
    shutil.rmtree(run_dir.model("rationale"))
    result = forked(job, world_size=2)
    assert result.returncode == 0, result.stderr[-3000:]
    notes = [point["note"] for point in points_of(job) if "note" in point]
    assert any(f"does not hold the model of step {best}" in note for note in notes)
    assert read_json(run_dir.best_model("rationale") / "mmcot.json")["step"] > last


def test_every_training_keeps_its_best_model(undisturbed):
    run_dir = RunDir(Path(undisturbed.run_dir))
    measured = [p["metrics"]["validation_loss"] for p in points_of(undisturbed) if "validation_loss" in p["metrics"]]
    assert read_json(run_dir.best_model("rationale") / "mmcot.json")["validation_loss"] == min(measured)


@pytest.mark.long
def test_a_step_that_is_not_finite_stops_every_stage_and_precision_and_names_its_questions(
    make_job, forked, tiny_data, tmp_path
):
    shards = tmp_path / "shards"
    shutil.copytree(tiny_data.path, shards)
    questions = [
        problem
        for shard in manifest_shards(tiny_data.text, "train")
        for problem in read_problems(tiny_data.path / "text", shard)
    ]
    bad = next(problem.qid for problem in questions if problem.images)

    def poisoned(problem, counts):
        array = np.zeros((64, 208), np.float16) if problem.images else np.zeros((0, 208), np.float16)
        return np.full_like(array, np.inf) if problem.qid == bad else array

    shutil.rmtree(shards / "features" / "patch")
    write_feature_shards(shards, name="patch", features_of=poisoned, shape=(64, 208))
    engines = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
    jobs = [
        dataclasses.replace(
            make_job(f"inf-{stage}-{precision}", zero_stage=stage, precision=precision), shards_dir=str(shards)
        )
        for stage, precision in engines
    ]
    result = forked(*jobs, world_size=2)
    assert result.returncode == 0, result.stderr[-3000:]
    for job, engine in zip(jobs, engines, strict=True):
        for rank in (0, 1):
            message = (Path(job.run_dir) / f"job.error{rank}").read_text()
            match = re.match(
                r"step (\d): the loss is (nan|inf); nothing of this step was kept, "
                r"the last checkpoint is that of step (\d)",
                message,
            )
            assert match and int(match[3]) == int(match[1]) // 2 * 2, (engine, message)
            assert (
                bad in message.rpartition("batch: ")[2].split(", ")
                and len(message.rpartition("batch: ")[2].split(", ")) == 12
            )


def test_sigterm_writes_a_checkpoint_and_ends_with_a_status_that_says_so(make_job):
    job = make_job("stopped", checkpoint_every=1000, loader_processes=1)
    assert torchrun(job, world_size=2, die=(1, -3)).returncode != 0  # a minus: SIGTERM instead of SIGKILL
    assert (RunDir(Path(job.run_dir)).checkpoints("rationale") / "LATEST").read_text() == "step-000004\n"
    assert any("stopped after step 4, as requested" in point.get("note", "") for point in points_of(job))


def test_a_full_disk_is_explained_and_the_last_checkpoint_stands(make_job, forked, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    try:
        job = dataclasses.replace(make_job("full"), run_dir=str(small / "run"))
        commit_json(small / "run" / "lock.json", {"attempt": 1})
        result = forked(job, world_size=2)
        assert result.returncode != 0
        what = r"(checkpoint of step \d|model|journal of the training)"
        message = re.search(rf"CheckpointError: the {what} could not be written to .* GB free\).*", result.stderr)
        latest = (RunDir(Path(job.run_dir)).checkpoints("rationale") / "LATEST").read_text().strip()
        assert (
            message
            and latest in ("step-000002", "step-000004")
            and f"{latest} is kept: free disk space and run again" in message[0]
        )
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_checkpoint_keeps_its_promises(undisturbed):
    folder = RunDir(Path(undisturbed.run_dir)).checkpoints("rationale")
    manifest = read_json(folder / "step-000005" / "manifest.json")
    assert manifest["step"] == 5 and manifest["world_size"] == 2 and len(manifest["files"]) >= 3
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004", "step-000005"]  # two are kept


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(make_job, forked, trained, undisturbed):
    job = make_job("damaged")
    checkpoints = RunDir(Path(job.run_dir)).checkpoints("rationale")
    shutil.copytree(RunDir(Path(undisturbed.run_dir)).checkpoints("rationale"), checkpoints)
    other = dataclasses.replace(
        job, settings=job.settings.model_copy(update={"run": job.settings.run.model_copy(update={"seed": 5})})
    )
    result = forked(other, world_size=2)
    assert result.returncode != 0 and "was written with plan_fingerprint" in result.stderr
    victim = next((checkpoints / "step-000005" / "state").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10] + b"0123456789")
    trained(job)
    assert_equal_weights(job, undisturbed)
    notes = [point["note"] for point in points_of(job) if "note" in point]
    damaged = next(note for note in notes if f"step-000005 is damaged ({victim.name} is missing or altered" in note)
    assert "the one before is used" in damaged
    assert any("does not hold the model of step" in note for note in notes)  # checkpoints alone were copied
    assert (checkpoints / "damaged-step-000005").exists() and min(losses(job)) == 5


def test_the_exported_model_opens_with_from_pretrained_and_its_tokenizer(undisturbed):
    from transformers import AutoTokenizer

    from mmcot.models.t5 import T5ForMultimodalGeneration

    folder = RunDir(Path(undisturbed.run_dir)).model("rationale")
    model = T5ForMultimodalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vision_dim == 208 and len(tokenizer) == model.config.vocab_size
    text = "Solution: The north pole is red."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_a_journal_torn_by_a_kill_loses_only_the_torn_line(tmp_path):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.log(1, {"loss": 1.0})
    journal.close()
    with open(path, "a") as file:
        file.write('{"step": 2, "met')
    journal = Journal(path)
    journal.log(2, {"loss": 0.5})
    assert [point["step"] for point in JournalReader(path).read()] == [1, 2]
    assert json.loads(path.read_text().splitlines()[0])["metrics"] == {"loss": 1.0}
