"""Features of problems, read from a published array.

The functions count questions with and without features under the names of ``PICTURE_COUNTS``
(``picture_features.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from mmcot.errors import InputError
from mmcot.texts.sample import Sample

FeaturesOf = Callable[[Sample, Counter[str]], np.ndarray]


class FeatureError(InputError):
    """Ready-made features are not valid; the message names file and row."""


def ready_made_features(
    array: np.ndarray, name_map: Mapping[str, str], *, name: str
) -> tuple[FeaturesOf, tuple[int, int]]:
    """Return a function that reads published features: one array for all questions, and a map from qid to row.

    A question without a row in the map counts as a question without a picture, as in the
    published system. A pooled vector that was repeated P times is stored once.

    Args:
        array: floats [N, P, D]; may be memory-mapped.
        name_map: {qid: row as text}.
        name: the file, for errors.

    Returns:
        the function, and [P, D].

    Raises:
        FeatureError: the array is not [N, P, D], or a row is outside it; the function raises it
            if a row is not finite, or does not fit float16.
    """
    if array.ndim != 3 or array.dtype.kind != "f":
        raise FeatureError(
            f"{name} has shape {array.shape} and type {array.dtype}; expected floats [rows, patches, width]"
        )
    rows = {qid: int(row) for qid, row in name_map.items()}
    outside = {qid: row for qid, row in rows.items() if not 0 <= row < len(array)}
    if outside:
        qid, row = next(iter(outside.items()))
        raise FeatureError(
            f"{name} has {len(array):,} rows, name_map.json names {len(outside):,} beyond them (question {qid}: row "
            f"{row}); take both files from the same download"
        )
    pooled = all(_is_pooled(array[row]) for row in list(rows.values())[:16]) and array.shape[1] > 1 and bool(rows)

    def features_of(problem: Sample, counts: Counter[str]) -> np.ndarray:
        if problem.qid not in rows:
            counts["num_picture_absent" if problem.images else "num_no_image"] += 1
            return np.zeros((0, array.shape[2]), dtype=np.float16)
        values = np.asarray(array[rows[problem.qid]])
        if pooled:
            if not _is_pooled(values):
                raise FeatureError(
                    f"{name}, row {rows[problem.qid]} (question {problem.qid}): patches differ, in other rows they "
                    "repeat"
                )
            values = values[:1]
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise FeatureError(
                f"{name}, row {rows[problem.qid]} (question {problem.qid}) holds NaN, infinity or values beyond "
                "float16; make it again"
            )
        counts["num_with_features"] += 1
        return half

    return features_of, (1 if pooled else array.shape[1], array.shape[2])


def _is_pooled(values: np.ndarray) -> bool:
    return bool((values == values[:1]).all())
