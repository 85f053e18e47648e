"""A checkpoint's files are written behind the training, from copies."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections import OrderedDict

import pytest
import torch

from launcher.training import checkpoint_writer, host_memory
from launcher.training.best_model import BestLoss
from launcher.training.checkpoint_writer import FileWriter, HostCopies, copy_to_host


class Inner:
    """A checkpoint engine that only answers."""

    def load(self, path, map_location=None):
        return f"loaded {path}"


def test_what_is_written_is_the_state_when_it_was_saved(tmp_path):
    copies, weights = HostCopies(Inner()), torch.arange(6.0)
    copies.save(OrderedDict(weights=weights, groups=[{"lr": 0.1, "shape": weights.shape}]), str(tmp_path / "a.pt"))
    weights.zero_()
    writer = copies.write()
    files = writer.result()
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    assert state["weights"].tolist() == [0, 1, 2, 3, 4, 5] and state["groups"] == [{"lr": 0.1, "shape": (6,)}]
    content = (tmp_path / "a.pt").read_bytes()
    assert files == {tmp_path / "a.pt": {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    assert copies.write().result() == {} and copies.load("b") == "loaded b" and writer.is_done


def test_the_memory_of_a_written_checkpoint_is_used_for_the_next_one(tmp_path):
    copies, weights, places = HostCopies(Inner()), torch.arange(6.0), []
    for number in range(3):
        copies.save({"weights": weights + number}, str(tmp_path / f"{number}.pt"))
        places.append(copies._used[0].data_ptr())
        copies.write().result()
    assert len(set(places)) == 1
    values = [torch.load(tmp_path / f"{number}.pt", weights_only=True)["weights"][0].item() for number in range(3)]
    assert values == [0, 1, 2]


def test_a_shared_tensor_is_copied_once_and_a_part_of_a_large_one_alone():
    large = torch.zeros(1000)
    copy = copy_to_host({"a": large[:3], "b": large[:3], "c": large[3:6]}, {}, torch.empty_like)
    assert copy["a"] is copy["b"] and copy["a"] is not copy["c"]
    assert copy["a"].untyped_storage().nbytes() == 12


def test_the_training_goes_on_while_a_file_is_written(tmp_path, monkeypatch):
    may_write = threading.Event()
    save = checkpoint_writer.save_hashed
    monkeypatch.setattr(checkpoint_writer, "save_hashed", lambda *values: may_write.wait(10) and save(*values))
    writer = FileWriter([(tmp_path / "a.pt", {"a": 1})])
    assert not writer.is_done
    may_write.set()
    assert len(writer.result()) == 1


def test_a_file_that_cannot_be_written_is_told_when_the_checkpoint_is_committed(tmp_path):
    writer = FileWriter([(tmp_path / "none" / "a.pt", {})])
    with pytest.raises(OSError) as error:
        writer.result()
    assert error.value.errno == errno.ENOENT


class Unwritable:
    """A part of a state that no pickle takes."""

    def __reduce__(self):
        raise MemoryError("no memory for the pickle")


def test_whatever_stops_the_writer_the_checkpoint_does_not_count_as_written(tmp_path):
    writer = FileWriter([(tmp_path / "a.pt", {"a": Unwritable()}), (tmp_path / "b.pt", {})])
    with pytest.raises(MemoryError, match="no memory for the pickle"):
        writer.result()


def test_without_memory_for_a_copy_the_state_is_written_at_once(tmp_path, monkeypatch):
    written = {}
    inner = Inner()
    inner.save = lambda state, path: written.update({path: state})
    copies = HostCopies(inner)
    monkeypatch.setattr(host_memory, "KEPT_FREE_BYTES", 10**15)
    copies.save({"a": torch.zeros(3)}, "a.pt")
    assert list(written) == ["a.pt"] and copies.write().result() == {}


def test_the_state_of_early_stopping_survives_a_checkpoint_also_where_no_loss_was_finite():
    best = BestLoss()
    assert not best.add(10, float("nan"), patience=3)
    assert best.add(20, 0.5, patience=3) and not best.add(30, 0.6, patience=3)
    for state in (BestLoss(num_worse=2), best):
        manifest = json.loads(json.dumps({"validation": state.as_fact()}))
        assert BestLoss.of_manifest(manifest) == state
    assert BestLoss.of_manifest({}) == BestLoss()


def test_a_state_file_has_the_sha256_of_what_was_written_though_the_disk_has_other_bytes(tmp_path, monkeypatch):
    path, fsync, written = tmp_path / "state.pt", os.fsync, []

    def alter(descriptor):
        fsync(descriptor)
        written.append(path.read_bytes())
        path.write_bytes(b"?" + written[0][1:])

    monkeypatch.setattr(checkpoint_writer.os, "fsync", alter)
    found = checkpoint_writer.save_hashed({"a": [1, 2, 3]}, path)
    assert found == {"size_bytes": len(written[0]), "sha256": hashlib.sha256(written[0]).hexdigest()}
