"""The ledger of generated texts: every candidate of every question once, with its model and seed."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.atomic_files import commit_json, read_json
from data_shards.errors import ShardError
from data_shards.generated_texts import Task, close_output, open_output, sha256_written, write_task
from data_shards.generation_ledger import LedgerText, read_ledger
from data_shards.sealed_json import commit_sealed
from data_shards.text_lines import texts_of
from mmcot.errors import InputError

TASKS = (Task("val", "val-000000", 0, 2), Task("val", "val-000000", 2, 1))
QIDS = (("a", "b"), ("c",))


def lines_of(qids, num_candidates):
    line = {"rationale": "because", "num_tokens": 2, "finish": "eos"}
    candidates = [{"candidate": number, **line, "log_prob": -1.0} for number in range(num_candidates)]
    return [{"qid": qid, **line, **({"candidates": candidates} if num_candidates > 1 else {})} for qid in qids]


def write_texts(folder, *, num_candidates=2, lines=None, complete=True, weights="w", seed=7):
    open_output(folder, {"model": "1"})
    files = {}
    for task, qids in zip(TASKS, QIDS, strict=True):
        part = (lines or {}).get(task, lines_of(qids, num_candidates))
        write_task(folder, task, part, weights=weights, seed=seed)
        files[task.file_name] = {"sha256": sha256_written(folder, task), "num_samples": task.num_samples}
    if complete:
        close_output(folder, files=files, summary={})
    return folder


def entry_of(folder, task):
    return folder / "ledger" / task.file_name.replace(".jsonl", ".json")


@pytest.mark.parametrize("complete", [True, False])
def test_every_candidate_is_there_once_with_its_weights_and_seed(tmp_path, complete):
    assert list(read_ledger(write_texts(tmp_path, complete=complete))) == [
        LedgerText(qid, candidate, seed=7, weights="w", split="val") for qid in "abc" for candidate in (0, 1)
    ]


def test_one_text_a_question_is_its_candidate_0(tmp_path):
    texts = list(read_ledger(write_texts(tmp_path, num_candidates=1)))
    assert [(text.qid, text.candidate) for text in texts] == [("a", 0), ("b", 0), ("c", 0)]


@given(st.lists(st.integers(1, 4), max_size=5))
def test_the_texts_of_lines_are_all_their_candidates_in_order(sizes):
    lines = [line for number, size in enumerate(sizes) for line in lines_of([f"q{number}"], size)]
    assert texts_of(lines) == [[f"q{number}", at] for number, size in enumerate(sizes) for at in range(size)]


def test_a_file_that_is_not_committed_yet_is_not_counted(tmp_path):
    write_texts(tmp_path, complete=False)
    (tmp_path / TASKS[1].file_name).unlink()
    shutil.copy(entry_of(tmp_path, TASKS[0]), tmp_path / "ledger" / "val" / ".tmp-1.json")  # of a killed process
    assert {text.qid for text in read_ledger(tmp_path)} == {"a", "b"}


@pytest.mark.parametrize("is_removed", [True, False])
def test_an_output_of_an_earlier_version_is_read_without_weights_and_seed(tmp_path, is_removed):
    write_texts(tmp_path, num_candidates=1)
    for task in TASKS:
        entry = read_json(entry_of(tmp_path, task))
        commit_json(entry_of(tmp_path, task), {name: entry[name] for name in ("sha256", "num_samples")})
    if is_removed:
        shutil.rmtree(tmp_path / "ledger")
    assert list(read_ledger(tmp_path)) == [LedgerText(qid, 0, None, None, "val") for qid in "abc"]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(lines_of("ab", 2)[:1], id="a question is missing"),
        pytest.param(lines_of("a", 2) + lines_of("b", 1), id="a candidate is missing"),
        pytest.param(lines_of("a", 2) + lines_of("b", 3), id="a candidate too many"),
        pytest.param(lines_of("aa", 2)[:1] + lines_of("ab", 2), id="a question too many"),
        pytest.param([], id="no text at all"),
        pytest.param(lines_of("ab", 3), id="more candidates than in the other file"),
    ],
)
def test_a_text_that_is_missing_or_too_many_is_found(tmp_path, lines):
    write_texts(tmp_path, lines={TASKS[0]: lines})
    with pytest.raises(ShardError, match=r"val/000000-.*texts are not . candidates of each of . questions, once each"):
        list(read_ledger(tmp_path))


def test_a_candidate_that_is_there_twice_is_found(tmp_path):
    lines = lines_of("ab", 2)
    lines[0]["candidates"] = lines[0]["candidates"][:1] * 2
    with pytest.raises(ShardError, match="not 2 candidates of each of 2 questions"):
        list(read_ledger(write_texts(tmp_path, lines={TASKS[0]: lines})))


def test_a_question_in_two_files_is_found(tmp_path):
    write_texts(tmp_path, lines={TASKS[1]: lines_of("b", 2)})
    with pytest.raises(ShardError, match="question b of split 'val' is there a second time"):
        list(read_ledger(tmp_path))


def test_an_entry_of_another_file_than_the_manifest_names_is_found(tmp_path):
    write_texts(tmp_path)
    write_task(tmp_path, TASKS[0], lines_of("xy", 2))
    with pytest.raises(ShardError, match="is of another file than the manifest names"):
        list(read_ledger(tmp_path))


def test_an_altered_entry_is_named(tmp_path):
    path = entry_of(write_texts(tmp_path), TASKS[0])
    commit_json(path, read_json(path) | {"seed": 8})
    with pytest.raises(InputError, match=r"000000-000000.json.*it was altered"):
        list(read_ledger(tmp_path))
    commit_sealed(path, {"sha256": 1, "num_samples": 2})
    with pytest.raises(InputError, match="the key 'sha256' is 1, expected a text"):
        list(read_ledger(tmp_path))
