"""Fixtures: a finished run whose models have random weights."""

from __future__ import annotations

import pytest

from data_shards.atomic_files import commit_bytes
from launcher.config.loading import dump_settings


@pytest.fixture(scope="session")
def finished_run(tiny_settings, tiny_data, workplace):
    """A run's folder with two models of random weights."""
    from launcher.stages.build_model import build_model
    from launcher.stages.samples import load_tokenizer, open_stage

    run = workplace / "runs" / "predict"
    tokenizer = load_tokenizer(tiny_settings, tiny_data.path)
    samples = open_stage(tiny_settings, "rationale", "train", shards_dir=tiny_data.path, tokenizer=tokenizer, texts={})
    for stage in ("rationale", "answer"):
        build_model(tiny_settings, samples).save_pretrained(run / stage / "model")
        tokenizer.save_pretrained(run / stage / "model")
    commit_bytes(run / "run.yaml", dump_settings(tiny_settings).encode())
    return run
