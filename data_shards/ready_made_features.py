"""Features of problems, read from a published array.

The functions count questions with and without features under the names of ``PICTURE_COUNTS``
(``picture_features.py``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable

import numpy as np

from mmcot.errors import Faults, InputError
from mmcot.texts.sample import Sample

FeaturesOf = Callable[[Sample, Counter[str]], np.ndarray]


class FeatureError(InputError):
    """Ready-made features are not valid; the message names file and row."""


def ready_made_features(
    array: np.ndarray, name_map: object, *, name: str, map_name: str = "name_map.json"
) -> tuple[FeaturesOf, tuple[int, int]]:
    """Return a function that reads published features: one array for all questions, and a map from qid to row.

    A question without a row in the map counts as a question without a picture, as in the
    published system. A pooled vector that was repeated P times is stored once.

    Args:
        array: floats [N, P, D]; may be memory-mapped.
        name_map: {qid: row, as text or as an integer}, as it was read.
        name: the file, for errors.
        map_name: the map's file, for errors.

    Returns:
        the function, and [P, D].

    Raises:
        FeatureError: the array is not [N, P, D], the map is no such object, or a row is outside the array; the
            function raises it if a row is not finite, or does not fit float16.
        FaultsError: several rows of the map are not valid.
    """
    if array.ndim != 3 or not array.shape[2] or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise FeatureError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected floats [rows, patches, width]"
        )
    rows = _rows(name_map, map_name)
    outside = {qid: row for qid, row in rows.items() if not 0 <= row < len(array)}
    if outside:
        qid, row = next(iter(outside.items()))
        raise FeatureError(
            f"{name} has {len(array):,} rows, {map_name} names {len(outside):,} beyond them (question {qid}: row "
            f"{row}); take both files from the same download"
        )
    pooled = all(_is_pooled(array[row]) for row in list(rows.values())[:16]) and array.shape[1] > 1 and bool(rows)

    def features_of(problem: Sample, counts: Counter[str]) -> np.ndarray:
        if problem.qid not in rows:
            counts["num_picture_absent" if problem.images else "num_no_image"] += 1
            return np.zeros((0, array.shape[2]), dtype=np.float16)
        values = np.asarray(array[rows[problem.qid]])
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise FeatureError(
                f"{name}, row {rows[problem.qid]} (question {problem.qid}) holds NaN, infinity or values beyond "
                "float16; make it again"
            )
        if pooled and not _is_pooled(values):
            raise FeatureError(
                f"{name}, row {rows[problem.qid]} (question {problem.qid}): patches differ, in other rows they repeat; "
                "make the file again, by one encoder"
            )
        counts["num_with_features"] += 1
        return half[:1] if pooled else half

    return features_of, (1 if pooled else array.shape[1], array.shape[2])


def _rows(name_map: object, map_name: str) -> dict[str, int]:
    if not isinstance(name_map, dict):
        raise FeatureError(
            f'{map_name} holds a value of type {type(name_map).__name__}, expected an object such as {{"q1": "0"}}, '
            "from questions to rows"
        )
    rows, faults = {}, Faults()
    for qid, row in name_map.items():
        with faults.gathered(map_name, member=f"key {qid!r}"):
            rows[qid] = _row(row)
    faults.raise_any()
    return rows


def _row(row: object) -> int:
    if type(row) is int and row >= 0:
        return row
    if isinstance(row, str) and re.fullmatch("[0-9]{1,18}", row):
        return int(row)
    raise FeatureError(
        f'the row is {json.dumps(row)[:60]}, expected a number from 0 on, such as 12 or "12"; leave questions without '
        "features out"
    )


def _is_pooled(values: np.ndarray) -> bool:
    return bool((values == values[:1]).all())
