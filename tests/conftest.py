"""Fixtures: a small MiniSQA as a data folder, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

TINY = [
    "data.mini_sqa.num_train=64", "data.mini_sqa.num_val=16", "data.mini_sqa.num_test=16",
    "data.samples_per_shard=24", "training.log_every=1", "rationale.max_target_tokens=48", "generation.task_samples=16",
]  # fmt: skip


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder that data and runs may be written to; relative paths start here."""
    return tmp_path_factory.mktemp("workplace")


@pytest.fixture(scope="session")
def tiny_settings(workplace):
    """The demo preset at a size of seconds."""
    from launcher.config import load_settings

    return load_settings(preset="demo", overrides=[*TINY, f"data.shards_dir={workplace / 'shards'}"])


@pytest.fixture(scope="session")
def tiny_data(workplace, tiny_settings):
    """A finished data folder of 64 + 16 + 16 questions, in three training shards."""
    from launcher.data import prepare_data

    before = os.getcwd()
    os.chdir(workplace)
    try:
        return prepare_data(tiny_settings, lambda line: None)
    finally:
        os.chdir(before)
