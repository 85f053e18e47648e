"""The training loop on real DeepSpeed ranks over gloo, started without Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_shards.storage import commit_json, read_json
from data_shards.reader import SplitReader
from launcher.engine import learning_rate
from launcher.ledger import LedgerError, prove_ledger
from launcher.journal import Journal, JournalReader
from launcher.run_dir import RunDir

def torchrun(job, *, world_size, die=()):
    path = Path(job.run_dir) / "job.json"
    commit_json(path, dataclasses.asdict(dataclasses.replace(job, settings=job.settings.model_dump())))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run(
        [*command, str(Path(__file__).with_name("rank.py")), str(path), *map(str, die)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def trained(job, *, world_size=2):
    result = torchrun(job, world_size=world_size)
    assert result.returncode == 0, result.stderr[-3000:]
    return load_file(RunDir(Path(job.run_dir)).model("rationale") / "model.safetensors")


def losses(job):
    points = JournalReader(RunDir(Path(job.run_dir)).journal("rationale")).read()
    return {point["step"]: point["metrics"]["loss"] for point in points if "loss" in point["metrics"]}


@pytest.fixture(scope="module")
def undisturbed(make_job):
    job = make_job("undisturbed")
    return job, trained(job)


def test_a_rank_killed_with_9_resumes_to_bit_equal_weights(make_job, undisturbed):
    job = make_job("killed")
    assert torchrun(job, world_size=2, die=(1, 3)).returncode != 0
    assert (RunDir(Path(job.run_dir)).checkpoints("rationale") / "LATEST").read_text() == "step-000002\n"
    weights = trained(job)
    expected_job, expected = undisturbed
    assert weights.keys() == expected.keys()
    assert all((weights[name] == expected[name]).all() for name in expected)
    assert losses(job) == losses(expected_job)  # step 3 was computed twice, alike


def test_the_ledger_of_a_killed_and_resumed_training_adds_up_and_a_forged_one_does_not(make_job, tiny_data):
    job = dataclasses.replace(make_job("ledger", ledger=True), num_steps=13)  # two epochs of six steps and a bit
    assert torchrun(job, world_size=2, die=(0, 9)).returncode != 0
    trained(job)
    run_dir, qids = RunDir(Path(job.run_dir)), [str(qid) for qid in SplitReader(tiny_data.path, "train").qids]
    lines = prove_ledger(run_dir, "rationale", qids)
    assert [line.endswith("64 questions, each exactly once") for line in lines] == [True, True, False]
    assert "12 questions, none twice, 52 not reached" in lines[2]
    path = run_dir.ledger("rationale", 1)
    forged = [json.loads(line) for line in path.read_text().splitlines()]
    stolen = next(iter(forged[0]["blocks"].values()))[0]
    for line in forged:
        if line["step"] == 1:
            next(iter(line["blocks"].values()))[0] = stolen
    path.write_text("".join(json.dumps(line) + "\n" for line in forged))
    with pytest.raises(LedgerError, match=rf"epoch 0: used twice \['{stolen}'\], never"):
        prove_ledger(run_dir, "rationale", qids)


def test_two_loader_processes_load_what_the_thread_loads(make_job, undisturbed):
    job = make_job("loaders", loader_processes=2)
    weights = trained(job)
    _, expected = undisturbed
    assert all((weights[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize("remote", ["ranges", "cache"])
def test_a_training_from_s3_is_the_one_from_local_shards(make_job, undisturbed, s3, tmp_path, remote):
    job = make_job(f"s3-{remote}", loader_processes=1)
    data = job.settings.data.model_copy(update={"remote": remote, "cache_dir": str(tmp_path)})
    job = dataclasses.replace(job, shards_dir=s3, settings=job.settings.model_copy(update={"data": data}))
    weights = trained(job)
    _, expected = undisturbed
    assert all((weights[name] == expected[name]).all() for name in expected)
    points = [point["metrics"] for point in JournalReader(RunDir(Path(job.run_dir)).journal("rationale")).read()]
    assert [metrics["gigabytes_read"] for metrics in points if "loss" in metrics][-1] > 0


def test_one_rank_computes_the_losses_and_weights_of_two(make_job, undisturbed):
    # Three blocks a batch: with two ranks one of them runs a dummy block at each step.
    job = make_job("alone")
    weights = trained(job, world_size=1)
    expected_job, expected = undisturbed
    assert losses(job) == pytest.approx(losses(expected_job), rel=1e-6)
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-5


def test_zero_3_computes_the_losses_of_zero_2_and_exports_the_whole_model(make_job, undisturbed):
    job = make_job("zero3", zero_stage=3)
    weights = trained(job)
    expected_job, expected = undisturbed
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in expected.items()}
    assert losses(job) == pytest.approx(losses(expected_job), rel=1e-6)


def test_a_checkpoint_keeps_its_promises(make_job, undisturbed):
    job, _ = undisturbed
    folder = RunDir(Path(job.run_dir)).checkpoints("rationale")
    manifest = read_json(folder / "step-000005" / "manifest.json")
    assert manifest["step"] == 5 and manifest["world_size"] == 2 and len(manifest["files"]) >= 3
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-000004", "step-000005"]  # two are kept


def test_an_altered_checkpoint_and_another_plan_are_refused_by_name(make_job, undisturbed):
    expected_job, _ = undisturbed
    job = make_job("altered")
    checkpoints = RunDir(Path(job.run_dir)).checkpoints("rationale")
    shutil.copytree(RunDir(Path(expected_job.run_dir)).checkpoints("rationale"), checkpoints)
    other = dataclasses.replace(job, settings=job.settings.model_copy(update={"run": job.settings.run.model_copy(update={"seed": 5})}))
    result = torchrun(other, world_size=2)
    assert result.returncode != 0 and "was written with plan_fingerprint" in result.stderr
    victim = next((checkpoints / "step-000005" / "state").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-10] + b"0123456789")
    result = torchrun(job, world_size=2)
    assert result.returncode != 0 and f"{victim.name} is missing or altered" in result.stderr


def test_the_exported_model_opens_with_from_pretrained_and_its_tokenizer(undisturbed):
    from transformers import AutoTokenizer

    from mmcot.model import T5ForMultimodalGeneration

    folder = RunDir(Path(undisturbed[0].run_dir)).model("rationale")
    model = T5ForMultimodalGeneration.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vision_dim == 208 and len(tokenizer) == model.config.vocab_size
    text = "Solution: The north pole is red."
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_learning_rate_warms_up_then_falls_linearly(tiny_settings):
    training = tiny_settings.training.model_copy(update={"learning_rate": 1.0, "warmup_steps": 10, "final_lr_fraction": 0.1})
    rates = [learning_rate(step, training=training, total_steps=110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55) and min(rates) >= 0.1
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


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
