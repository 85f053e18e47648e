"""What ranks tell each other is JSON: two gloo ranks, one of them a stranger."""

from __future__ import annotations

import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_shards.atomic_files import read_json
from launcher.runs.run_dir import RunDir

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """What each of two ranks met (``tests/helpers/collective_ranks.py``), and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).parents[1] / "helpers" / "collective_ranks.py"),
                str(rank),
                str(folder),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=100)[1][-3000:] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    return [read_json(folder / f"found{rank}.json") for rank in (0, 1)], folder


def test_every_rank_has_the_values_of_all_in_the_order_of_ranks(exchange):
    for found in exchange[0]:
        assert found["gathered"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "x" * 5000}]


def test_one_ranks_value_reaches_all_whatever_the_others_hold(exchange):
    assert all(found["nested"] and found["from_rank_1"] == [1] for found in exchange[0])


def test_what_json_cannot_hold_is_refused_where_it_is_sent(exchange):
    assert all("PosixPath is not JSON serializable" in found["path"]["error"] for found in exchange[0])


def test_a_pickle_that_a_rank_sends_is_refused_and_nothing_of_it_runs(exchange):
    found, folder = exchange
    assert (
        found[0]["pickle"]["error"].startswith("CollectiveError: rank 1 sent")
        and "no JSON" in found[0]["pickle"]["error"]
    )
    assert not list(folder.glob("from-*"))


@pytest.mark.parametrize("name", ["gather", "broadcast"])
def test_torchs_own_collectives_of_objects_open_no_pickle(exchange, name):
    found, folder = exchange
    assert "a pickle arrived from another rank and was not opened" in found[0][f"torch_{name}"]["error"]
    assert not list(folder.glob("from-*"))


def test_json_too_deep_to_be_read_is_refused(exchange):
    assert "rank 1 sent 100,000 bytes that are no JSON (RecursionError" in exchange[0][0]["deep"]["error"]


@pytest.mark.parametrize(("name", "size"), [("empty", "0"), ("negative", "-1"), ("huge", "268,435,457")])
def test_a_size_that_cannot_be_is_refused_before_memory_is_taken(exchange, name, size):
    assert f"rank 1 sent a size of {size} bytes, expected 1 to 268,435,456" in exchange[0][0][name]["error"]


def test_ranks_that_share_a_run_folder_accept_each_other(exchange):
    assert all(found["same_token"] == {"value": None} for found in exchange[0])


def test_a_rank_that_does_not_know_the_runs_token_ends_the_training_by_name(exchange):
    for rank, found in enumerate(exchange[0]):
        assert f"rank {1 - rank} joined this training without the token of its run" in found["other_token"]["error"]


def test_a_group_that_is_opened_later_is_proved_anew(exchange):
    assert all(found["known_group"] == {"value": None} for found in exchange[0])
    for rank, found in enumerate(exchange[0]):
        assert f"rank {1 - rank} joined this training without the token of its run" in found["later_group"]["error"]


def test_a_runs_token_is_drawn_once_and_readable_by_its_user_alone(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda _: RunDir(tmp_path).rank_token(), range(32)))
    assert len(set(tokens)) == 1 and len(tokens[0]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["rank-token"]
    assert stat.S_IMODE((tmp_path / "rank-token").stat().st_mode) == 0o600
