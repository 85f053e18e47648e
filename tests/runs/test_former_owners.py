"""What a process that no longer owns the run leaves alone, and lines that are no text."""

from __future__ import annotations

import pytest

from data_shards.atomic_files import commit_folder, commit_json, read_json
from launcher.runs.journal import Journal, JournalReader, LineFile
from launcher.runs.run_dir import RunDir, RunError
from launcher.tracking.run_log import RunLog


def test_a_folder_is_never_removed_for_one_that_is_not_there(tmp_path):
    commit_json(tmp_path / "model" / "model.json", {"number": 2})
    with pytest.raises(FileNotFoundError, match="staging"):
        commit_folder(tmp_path / ".staging-model", tmp_path / "model")
    assert read_json(tmp_path / "model" / "model.json") == {"number": 2}


def test_a_former_owner_adds_no_line_to_what_is_sent_to_mlflow(tmp_path):
    run_dir = RunDir(tmp_path)
    commit_json(tmp_path / "lock.json", {"attempt": 2})
    log = RunLog(LineFile(run_dir.tracking), "pipeline", tmp_path, lambda: run_dir.check_attempt(1))
    with pytest.raises(RunError, match="owned by attempt 2"):
        log.end("FAILED")
    assert run_dir.tracking.read_bytes() == b""


def test_a_line_that_is_no_text_is_skipped_like_a_torn_one(tmp_path):
    journal = Journal(tmp_path / "a.jsonl")
    journal.log(1, {"loss": 1.0})
    journal.close()
    with open(tmp_path / "a.jsonl", "ab") as file:
        file.write(b'{"step": 2, "no\xffte": 1}\n[3]\n')
    Journal(tmp_path / "a.jsonl").log(4, {"loss": 0.5})
    assert [point["step"] for point in JournalReader(tmp_path / "a.jsonl").read()] == [1, 4]


def test_an_id_that_is_none_is_refused_by_the_name_of_its_file(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "identity").write_bytes(b"0123\xb0567")
    with pytest.raises(RunError, match=r"logs/identity holds .* expected 32 hex digits"):
        RunDir(tmp_path).identity()
