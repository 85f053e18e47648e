"""What a process that no longer owns the run leaves alone, and lines that are no text."""

from __future__ import annotations

import pytest

from data_shards.atomic_files import commit_folder, commit_json, read_json
from launcher.runs.journal import Journal, JournalReader, LineFile
from launcher.runs.run_dir import RunDir, RunError
from launcher.runs.sample_ledger import Ledger, LedgerError, verify_ledger
from launcher.tracking.run_log import RunLog
from mmcot.errors import InputError


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


def test_a_line_of_another_shape_is_refused_by_its_number(tmp_path):
    Journal(tmp_path / "a.jsonl").log(1, {"loss": 1.0})
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"step": "2", "time_ms": 1, "metrics": {}}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: the key 'step' is '2', expected an integer"):
        list(JournalReader(tmp_path / "a.jsonl").read())


def test_a_ledger_with_a_step_of_many_digits_is_refused_without_counting_to_it(tmp_path):
    ledger = Ledger(tmp_path / "logs" / "rationale-ledger-rank0.jsonl", 2)
    ledger.record(10**11, [(0, ["a"])])
    with pytest.raises(LedgerError, match=r"no record of steps \[0, 1, 2"):
        verify_ledger(RunDir(tmp_path), "rationale", ["a"])
