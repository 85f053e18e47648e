"""The plan's promises, for sizes nobody owns."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.plan import Plan


@st.composite
def plans(draw):
    num_samples = draw(st.integers(0, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    micro = draw(st.integers(1, 6))
    return Plan(
        random.integers(1, 200, num_samples),
        random.integers(1, 60, num_samples),
        np.sort(random.integers(0, draw(st.integers(1, 9)), num_samples)),
        seed=draw(st.integers(0, 9)),
        epoch=draw(st.integers(0, 3)),
        micro_batch_size=micro,
        global_batch_size=micro * draw(st.integers(1, 7)),
        window_shards=draw(st.integers(1, 4)),
        group_by_length=draw(st.booleans()),
    )


@settings(deadline=None)
@given(plan=plans())
def test_an_epoch_uses_every_sample_exactly_once(plan):
    used = [sample for step in range(plan.num_steps) for block in plan.batch_blocks(step) for sample in block]
    assert sorted(used) == list(range(plan.num_samples))


@settings(deadline=None)
@given(plan=plans(), world_size=st.integers(1, 9))
def test_the_global_batch_is_the_same_at_every_world_size(plan, world_size):
    for step in range(plan.num_steps):
        whole = {index: tuple(block) for index, block in enumerate(plan.batch_blocks(step))}
        dealt = [
            (index, tuple(block))
            for rank in range(world_size)
            for index, block in plan.local_blocks(step, rank=rank, world_size=world_size)
            if block is not None
        ]
        assert len(dealt) == len(whole) and dict(dealt) == whole


@settings(deadline=None)
@given(plan=plans(), world_size=st.integers(1, 9))
def test_all_ranks_have_equally_many_micro_steps_and_own_block_indexes(plan, world_size):
    for step in range(plan.num_steps):
        local = [plan.local_blocks(step, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert len({len(blocks) for blocks in local}) == 1
        indexes = [index for blocks in local for index, _ in blocks]
        assert len(set(indexes)) == len(indexes)


@settings(deadline=None)
@given(plan=plans())
def test_only_the_last_batch_and_the_last_block_may_be_short(plan):
    for step in range(plan.num_steps):
        sizes = [len(block) for block in plan.batch_blocks(step)]
        if step < plan.num_steps - 1:
            assert sizes == [plan.micro_batch_size] * plan.blocks_per_batch
        else:
            assert all(size == plan.micro_batch_size for size in sizes[:-1]) and sizes[-1] > 0


def make_plan(**changes):
    random = np.random.default_rng(0)
    arguments = {
        "source_lengths": random.integers(20, 400, 4000),
        "target_lengths": random.integers(4, 150, 4000),
        "shard_of_sample": np.arange(4000) // 500,
        "seed": 0,
        "epoch": 0,
        "global_batch_size": 32,
        "micro_batch_size": 4,
    }
    return Plan(**{**arguments, **changes})


def test_epochs_differ_and_share_a_fingerprint():
    first, second = make_plan(epoch=0), make_plan(epoch=1)
    assert first.fingerprint == second.fingerprint
    assert [list(b) for b in first.batch_blocks(0)] != [list(b) for b in second.batch_blocks(0)]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"global_batch_size": 64}, {"window_shards": 2}, {"group_by_length": False}]
)
def test_any_other_argument_changes_the_fingerprint(change):
    assert make_plan(**change).fingerprint != make_plan().fingerprint


def test_grouping_by_both_lengths_nearly_removes_padding():
    # 1.02 against 1.56 for random blocks on these uniform lengths
    assert make_plan().padding_factor() < 1.05 < 1.4 < make_plan(group_by_length=False).padding_factor()


def test_reads_stay_within_a_window_of_shards():
    plan = make_plan(window_shards=2)
    steps_per_window = 1000 // 32
    shards = {
        int(plan.shard_of_sample[s]) for step in range(steps_per_window) for b in plan.batch_blocks(step) for s in b
    }
    assert len(shards) == 2


def test_ranks_have_far_more_similar_work_than_blocks_dealt_in_any_order():
    plan, random = make_plan(), np.random.default_rng(0)
    for world_size in (2, 3, 4):
        slowest = mean = 0
        for step in range(plan.num_steps):
            costs = random.permutation(plan._costs(plan.batch_blocks(step)))
            work = [costs[rank::world_size].sum() for rank in range(world_size)]
            slowest, mean = slowest + max(work), mean + sum(work) / world_size
        assert plan.imbalance(world_size) >= 1 and plan.imbalance(world_size) - 1 < 0.7 * (slowest / mean - 1)


def test_every_batch_holds_short_and_long_blocks():
    plan = make_plan()
    costs = np.concatenate([plan._costs(plan.batch_blocks(step)) for step in range(plan.num_steps - 1)])
    means = costs.reshape(-1, plan.blocks_per_batch).mean(axis=1)
    random_means = np.random.default_rng(0).permutation(costs).reshape(-1, plan.blocks_per_batch).mean(axis=1)
    assert means.std() < 0.3 * random_means.std()


def test_a_batch_that_cannot_be_is_refused_with_one_that_can():
    with pytest.raises(
        ValueError, match=r"global_batch_size \(30\) must be a multiple of micro_batch_size \(4\); try 32"
    ):
        make_plan(global_batch_size=30)


def test_a_step_outside_the_epoch_is_refused():
    plan = make_plan()
    with pytest.raises(IndexError, match="outside this epoch"):
        plan.batch_blocks(plan.num_steps)
