"""Pictures are opened in threads, and nothing that is seen of it differs from opening them one by one."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image

from data_shards import open_ahead as module
from data_shards.open_ahead import open_ahead
from data_shards.picture_features import features_of_pictures, open_pictures_of
from data_shards.sources.pictures import PictureError
from mmcot.texts.sample import Sample


def problem(number, *images):
    return Sample(qid=str(number), question="?", choices=("a", "b"), answer=0, images=images)


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        Image.new("RGB", (8 + number, 9), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n nothing")
    return tmp_path


def opener(folder, **options):
    return open_pictures_of(lambda problem: [folder / name for name in problem.images], **options)


def ahead(problems, counts=None, **options):
    options = {"num_threads": 3, "num_ahead": 5, **options}
    return open_ahead(problems, Counter() if counts is None else counts, **options)


class OpensAtOnce:
    """An executor without threads, so that what has been opened is known."""

    def __init__(self, *arguments, **options):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options):
        pass


def test_order_and_counts_are_those_of_one_by_one_also_where_the_first_pictures_are_the_slowest(folder):
    problems = [problem(n, *([f"{n}.png"] if n % 3 else []), *(["gone.png"] if n % 4 == 0 else [])) for n in range(12)]
    open_pictures, expected = opener(folder), Counter()
    one_by_one = [[image.size for image in open_pictures(each, expected)] for each in problems]

    def slow_at_first(each, counts):
        time.sleep(0.05 if int(each.qid) < 3 else 0)
        return open_pictures(each, counts)

    counts = Counter()
    opened = list(ahead(problems, counts, open_pictures=slow_at_first))
    assert [each for each, _ in opened] == problems
    assert [[image.size for image in images] for _, images in opened] == one_by_one
    assert counts == expected and len(counts) > 2


def test_an_error_names_its_picture_and_comes_after_all_pictures_before_it(folder):
    problems = [problem(0, "0.png"), problem(1, "1.png"), problem(2, "damaged.png"), problem(3, "3.png")]
    seen = []
    with pytest.raises(PictureError, match=r"question 2: picture .*damaged.png is damaged"):
        seen += [each.qid for each, _ in ahead(problems, open_pictures=opener(folder))]
    counts = Counter()
    opened = ahead(problems, counts, open_pictures=opener(folder, count_unreadable=True))
    assert [len(images) for _, images in opened] == [1, 1, 0, 1] and counts["num_pictures_unreadable"] == 1


def test_several_pictures_are_opened_at_once_and_while_the_first_is_used(folder):
    together = threading.Barrier(3, timeout=30)  # breaks unless three threads are here at once
    started = []

    def open_together(each, counts):
        started.append(each.qid)
        together.wait()
        return [Image.new("RGB", (2, 2))]

    opened = ahead([problem(n) for n in range(6)], open_pictures=open_together, num_ahead=6)
    next(opened)
    deadline = time.monotonic() + 30
    while len(started) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) == 6  # although the first alone was asked for
    assert len(list(opened)) == 5


def test_no_more_wait_than_asked_for_and_fewer_where_they_are_large(folder, monkeypatch):
    drawn = []

    def problems():
        for number in range(12):
            drawn.append(number)
            yield problem(number, f"{number}.png")

    opened = ahead(problems(), open_pictures=opener(folder), num_threads=1)
    next(opened)
    assert len(drawn) == 5
    opened.close()
    drawn.clear()
    monkeypatch.setattr(module, "MAX_PIXELS", 250)  # the pictures have 72, 81, 90, ... pixels
    monkeypatch.setattr(module, "ThreadPoolExecutor", OpensAtOnce)
    opened = ahead(problems(), open_pictures=opener(folder))
    next(opened)
    assert len(drawn) == 4
    assert len(list(opened)) == 11


def test_threads_open_no_more_pictures_than_have_space_and_the_first_in_line_always(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 250)
    opened, lock = set(), threading.Lock()

    def open_pictures(each, counts):
        if each.qid == "0":  # the others have filled the space by now
            deadline = time.monotonic() + 30
            while len(opened) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
        with lock:
            opened.add(each.qid)
        return [Image.new("RGB", (10, 10))]

    ahead_of_all = ahead([problem(n) for n in range(12)], open_pictures=open_pictures, num_threads=2, num_ahead=12)
    next(ahead_of_all)
    assert len(opened) <= 4  # three fill the space; with two threads one more may have begun before
    assert [each.qid for each, _ in ahead_of_all] == [str(n) for n in range(1, 12)]


def test_a_reader_that_stops_ends_threads_that_wait_for_space(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 50)
    opened = ahead((problem(n, f"{n}.png") for n in range(12)), open_pictures=opener(folder), num_ahead=12)
    next(opened)
    opened.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("open-pictures")]


def test_a_problem_is_reported_when_its_turn_comes_and_not_when_it_is_opened(folder):
    problems, turns, encoded = [problem(n, f"{n}.png") for n in range(8)], [], []

    def encode(images):
        encoded.append(len(turns))
        return np.zeros((len(images), 1, 3), dtype=np.float16)

    options = {"open_pictures": opener(folder), "encode": encode, "shape": (1, 3), "batch_size": 2}
    list(features_of_pictures(problems, Counter(), **options, on_problem=lambda: turns.append(1)))
    assert encoded == [2, 4, 6, 8]


def test_what_was_not_used_is_dropped_when_the_reader_stops(folder):
    opened = ahead((problem(n, f"{n}.png") for n in range(12)), open_pictures=opener(folder))
    next(opened)
    opened.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("open-pictures")]


def test_features_do_not_depend_on_threads_and_pictures_are_prepared_where_they_are_opened(folder):
    problems = [problem(n, *([f"{n}.png"] if n % 3 else [])) for n in range(12)]
    prepared_in = set()

    def prepare(image):
        prepared_in.add(threading.current_thread().name)
        return image.resize((4, 4))

    def encode(images):
        return np.stack([np.asarray(image.resize((4, 4)), dtype=np.float16).reshape(4, 12) for image in images])

    options = {"open_pictures": opener(folder), "encode": encode, "shape": (4, 12), "batch_size": 3}
    plain = list(features_of_pictures(problems, Counter(), **options))
    threaded = list(features_of_pictures(problems, Counter(), **options, prepare=prepare, num_threads=4))
    assert all(np.array_equal(a, b) for a, b in zip(plain, threaded, strict=True)) and len(plain) == 12
    assert all(name.startswith("open-pictures") for name in prepared_in)
