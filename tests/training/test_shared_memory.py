"""A small /dev/shm is told before loader processes start."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from launcher.config.settings import SettingsError
from launcher.training import shared_memory

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "fits"), [(32_000_000, True), (31_999_999, False)])
def test_blocks_that_do_not_fit_shared_memory_are_refused_with_what_to_give(free, fits, monkeypatch):
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: Usage(64_000_000, 0, free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    block = shared_memory.bytes_of({"features": torch.zeros(500, 1000), "ids": torch.zeros(250, 1000).long()})
    assert block == 4_000_000
    if fits:
        shared_memory.check_shared_memory(block, blocks_ahead=4)
        return
    with pytest.raises(SettingsError, match="hand 32 MB of blocks over by /dev/shm, which has 32 MB free; give the"):
        shared_memory.check_shared_memory(block, blocks_ahead=4)
