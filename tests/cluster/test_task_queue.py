"""The order of tasks, and the tasks that workers prepare for."""

from __future__ import annotations

from launcher.cluster.task_queue import TaskQueue

COSTS = {"a": 1, "b": 4, "c": 3, "d": 2}


def test_a_worker_takes_the_task_it_has_prepared_for():
    queue = TaskQueue(COSTS, max_attempts=1)
    assert queue.take() == "b"
    expected = queue.following()
    assert expected == "c" and queue.take(others={expected}) == "d"  # another worker leaves it
    assert queue.take(expected=expected) == "c"


def test_what_others_have_prepared_for_is_taken_where_nothing_else_waits():
    queue = TaskQueue(COSTS, max_attempts=1)
    others = {"b", "c", "d", "a"}
    assert queue.following(others=others) is None
    assert [queue.take(others=others) for _ in COSTS] == ["b", "c", "d", "a"]
    assert queue.take() is None and not queue


def test_a_task_that_another_worker_took_is_not_expected_any_more():
    queue = TaskQueue(COSTS, max_attempts=2)
    assert queue.take() == "b" and queue.take(expected="b") == "c"
    assert queue.failed("b", "no memory") and queue.take(expected="d") == "d" and queue.take() == "b"
