"""The shape of a file that is read again: what has another one is named by file, key, value and remedy."""

from __future__ import annotations

import pytest

from data_shards.json_shapes import ANY, NUMBER, Between, Text, Whole, fault_of_shape, read_record
from mmcot.errors import InputError


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (3, int),
        (3, float),
        (float("nan"), NUMBER),
        (0, Whole()),
        (-0.5, Between(-1, 1)),
        ("a.b", Text(r"[a-z.]+", "a.b")),
        (None, (str, None)),
        ({"a": 1, "more": 2}, {"a": int, "b?": str}),
        ({"x": ["y"]}, {str: [str]}),
        ([object], ANY),
    ],
)
def test_a_value_of_the_shape_has_no_fault(value, shape):
    assert fault_of_shape(value, shape) is None


@pytest.mark.parametrize(
    ("value", "shape", "fault"),
    [
        (True, int, "it is True, expected an integer"),
        (10**30, int, "it is an integer of more than 64 bits, expected an integer"),
        (float("inf"), float, "it is inf, expected a finite number"),
        (-1, Whole(), "it is -1, expected an integer from 0 on"),
        ("a/b", Text(r"[a-z.]+", "a.b"), "it is 'a/b', expected a text such as a.b"),
        ({}, {"a": int}, "the key 'a' is missing, expected an integer"),
        (
            {"a": {"b": [1, None]}},
            {"a": {"b": [int]}},
            "the key 'a', the key 'b', entry 2 is None, expected an integer",
        ),
        ([], dict, "it is [], expected an object"),
        (3, (str, None), "it is 3, expected a text or null"),
    ],
)
def test_a_fault_says_place_value_and_expectation(value, shape, fault):
    assert fault_of_shape(value, shape) == fault


def test_a_file_of_another_shape_is_refused_with_its_name_and_the_remedy(tmp_path):
    (tmp_path / "lock.json").write_text('{"pid": "7"}')
    with pytest.raises(InputError, match=r"lock\.json: the key 'pid' is '7', expected an integer; delete it$"):
        read_record(tmp_path / "lock.json", {"pid": int}, remedy="delete it")
