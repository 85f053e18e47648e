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
        max_tokens_per_block=draw(st.none() | st.integers(272, 3000)),
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
        if plan.max_tokens_per_block:
            assert len(sizes) == plan.blocks_per_batch or step == plan.num_steps - 1
        elif step < plan.num_steps - 1:
            assert sizes == [plan.micro_batch_size] * plan.blocks_per_batch
        else:
            assert all(size == plan.micro_batch_size for size in sizes[:-1]) and sizes[-1] > 0


@settings(deadline=None)
@given(plan=plans())
def test_no_block_has_more_tokens_than_the_budget_and_an_epoch_as_many_steps_as_without_one(plan):
    for step in range(plan.num_steps if plan.max_tokens_per_block else 0):
        for block in plan.batch_blocks(step):
            source, target = plan.source_lengths[block].max(), plan.target_lengths[block].max()
            assert len(block) * (-(-source // 16) * 16 + -(-target // 16) * 16) <= plan.max_tokens_per_block
    assert plan.num_steps == -(-plan.num_samples // plan.global_batch_size)


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
    "change",
    [
        {"seed": 1},
        {"global_batch_size": 64},
        {"window_shards": 2},
        {"group_by_length": False},
        {"max_tokens_per_block": 2000},
    ],
)
def test_any_other_argument_changes_the_fingerprint(change):
    assert make_plan(**change).fingerprint != make_plan().fingerprint


def test_grouping_by_both_lengths_nearly_removes_padding():
    # 1.02 against 1.56 for random blocks on these uniform lengths
    assert make_plan().padding_factor() < 1.05 < 1.4 < make_plan(group_by_length=False).padding_factor()


def test_blocks_of_tokens_are_full_and_have_little_padding():
    # 4,096 tokens are 14 questions of the mean length: 6 times the blocks of a batch of 128 would have 2.7.
    plan = make_plan(global_batch_size=128, max_tokens_per_block=4096)
    costs = np.concatenate([plan._costs(plan.batch_blocks(step)) for step in range(plan.num_steps)])
    assert plan.padding_factor() < 1.12 and costs.mean() > 0.85 * 4096
    longest = [plan.source_lengths[b].max() for step in range(plan.num_steps) for b in plan.batch_blocks(step)]
    of_batch = np.array(longest[: len(longest) // plan.blocks_per_batch * plan.blocks_per_batch])
    means = of_batch.reshape(-1, plan.blocks_per_batch).mean(axis=1)
    shuffled = np.random.default_rng(0).permutation(of_batch).reshape(-1, plan.blocks_per_batch).mean(axis=1)
    assert means.std() < 0.5 * shuffled.std()  # short and long ones in every batch


def test_every_epoch_has_equally_many_steps_of_equally_many_blocks_of_tokens():
    for epoch in range(3):
        plan = make_plan(epoch=epoch, max_tokens_per_block=2000)
        assert plan.num_steps == 125
        assert {len(plan.batch_blocks(step)) for step in range(124)} == {plan.blocks_per_batch}


def test_a_budget_below_the_longest_question_is_refused_with_the_least_that_fits():
    lengths = np.full(4000, 30), np.full(4000, 9)
    lengths[0][7] = 377
    with pytest.raises(
        ValueError,
        match=r"max_tokens_per_block \(399\) is below the longest question, 400 tokens \(source 377, target 9, each "
        r"rounded up to a multiple of 16\); give at least 400",
    ):
        make_plan(source_lengths=lengths[0], target_lengths=lengths[1], max_tokens_per_block=399)
    assert make_plan(source_lengths=lengths[0], target_lengths=lengths[1], max_tokens_per_block=400).num_steps == 125


def test_a_plan_without_a_budget_is_that_of_the_earlier_version():
    plan = make_plan()
    assert plan.fingerprint == "7ba6f34a8aec0d11"
    assert [int(block.sum()) for block in plan.batch_blocks(17)] == [7920, 8940, 9507, 8505, 10696, 8543, 7555, 8661]


@pytest.mark.parametrize("budget", [None, 2000])
def test_reads_stay_within_a_window_of_shards(budget):
    plan = make_plan(window_shards=2, max_tokens_per_block=budget)
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


@pytest.mark.parametrize("budget", [None, 2000])
def test_the_longest_block_is_the_one_with_the_most_tokens(budget):
    plan = make_plan(max_tokens_per_block=budget)
    costs = [plan._costs([b])[0] for step in range(plan.num_steps) for b in plan.batch_blocks(step)]
    assert plan._costs([plan.longest_block()])[0] == max(costs)
