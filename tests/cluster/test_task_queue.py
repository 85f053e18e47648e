"""The order of tasks, and the tasks that workers prepare for."""

from __future__ import annotations

import types

import ray
from ray.exceptions import ActorDiedError

from launcher.cluster.task_queue import TaskQueue
from launcher.cluster.worker_pool import _Pool

COSTS = {"a": 1, "b": 4, "c": 3, "d": 2}


def test_a_worker_takes_the_task_it_has_prepared_for():
    queue = TaskQueue(COSTS, max_attempts=1)
    assert queue.take() == "b"
    expected = queue.following()
    assert expected == ("c",) and queue.take(others={*expected}) == "d"  # another worker leaves it
    assert queue.take(expected=expected) == "c"


def test_what_others_have_prepared_for_is_taken_where_nothing_else_waits():
    queue = TaskQueue(COSTS, max_attempts=1)
    others = {"b", "c", "d", "a"}
    assert queue.following(others=others) == ()
    assert [queue.take(others=others) for _ in COSTS] == ["b", "c", "d", "a"]
    assert queue.take() is None and not queue


def test_a_task_that_another_worker_took_is_not_expected_any_more():
    queue = TaskQueue(COSTS, max_attempts=2)
    assert queue.take() == "b" and queue.take(expected=("b",)) == "c"
    assert queue.failed("b", "no memory") and queue.take(expected=("d",)) == "d" and queue.take() == "b"


def test_a_task_is_not_charged_again_for_a_process_that_dies_of_the_task_it_prepares_for(monkeypatch):
    queue, done, started = TaskQueue({"a": 2, "poison": 1}, max_attempts=3), [], []

    def run(task, following):
        started.append((task, following))
        return ActorDiedError() if "poison" in (task, *following) else "written"

    def remote(function):
        return types.SimpleNamespace(remote=function, options=lambda **options: remote(function))

    def make_actor(halvings):
        return types.SimpleNamespace(
            start=remote(lambda: Answer("process 1")),
            run=remote(lambda *arguments: Answer(run(*arguments))),
            progress_of=remote(lambda: Answer((1, "process 1"))),
        )

    monkeypatch.setattr(ray, "wait", lambda answers, **options: (answers[:1], answers[1:]))
    monkeypatch.setattr(ray, "get", lambda answer: answer.value())
    monkeypatch.setattr(ray, "kill", lambda actor: None)
    pool = _Pool(
        make_actor,
        queue,
        max_attempts=3,
        hang_timeout_s=60,
        use_gpu=False,
        is_committed=lambda task: task in done,
        done=lambda task, result: done.append(task),
        report=lambda line: None,
    )
    assert list(pool.run(1)) == ["poison"] and done == ["a"]
    assert started[:2] == [("a", ("poison",)), ("a", ())]


def test_a_worker_keeps_what_it_has_prepared_for_and_gets_more_for_what_it_took():
    queue = TaskQueue({str(number): -number for number in range(6)}, max_attempts=1)
    pool = object.__new__(_Pool)
    pool._queue, pool._tasks_ahead = queue, 2
    queue.take()
    assert pool._following((), {"1"}) == ("2", "3")
    queue.take(expected=("2", "3"))
    assert pool._following(("2", "3"), {"1"}) == ("3", "4")
    assert pool._following(("5", "3"), set()) == ("5", "3")


class Answer:
    """An answer that is awaited, known at once."""

    def __init__(self, result):
        self._result = result

    def value(self):
        if isinstance(self._result, Exception):
            raise self._result
        return self._result
