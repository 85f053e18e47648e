"""Planning range requests: few requests with few bytes that are not needed."""

from __future__ import annotations

import numpy as np

TAR_GAP_BYTES = 1024  # header and padding between two adjacent members of a tar
MAX_RANGE_BYTES = 8 << 20


def plan_ranges(
    files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, *, max_waste: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Join members with small gaps between them into ranges, smallest gaps first.

    Adjacent members are always joined. Larger gaps are joined while the sum of all gaps is below
    ``max_waste`` of the bytes needed. No range grows beyond ``MAX_RANGE_BYTES`` by joining.

    Args:
        files, offsets, sizes: of each member, int [N], in any order.

    Returns:
        ranges, int64 [R, 3] of (file, start, stop), and the range of each member, int64 [N].
    """
    if not len(files):
        return np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=np.int64)
    order = np.lexsort((offsets, files))
    files, starts, stops = files[order], offsets[order], offsets[order] + sizes[order]
    gaps = starts[1:] - stops[:-1]
    same_file = files[1:] == files[:-1]
    candidates = np.flatnonzero(same_file)
    candidates = candidates[np.argsort(gaps[candidates], kind="stable")]
    affordable = np.cumsum(gaps[candidates]) <= max_waste * sizes.sum()
    joined = np.zeros(len(gaps), dtype=bool)
    joined[candidates[affordable]] = True
    joined |= same_file & (gaps <= TAR_GAP_BYTES)
    breaks = ~joined
    start_of_range = starts[0]
    for member in range(1, len(starts)):  # long ranges are cut at the start of a member
        if breaks[member - 1] or stops[member] - start_of_range > MAX_RANGE_BYTES:
            breaks[member - 1] = True
            start_of_range = starts[member]
    number = np.concatenate([[0], np.cumsum(breaks)])
    firsts = np.searchsorted(number, np.arange(number[-1] + 1), side="left")
    lasts = np.searchsorted(number, np.arange(number[-1] + 1), side="right") - 1
    range_of_member = np.empty_like(number)
    range_of_member[order] = number
    return np.stack([files[firsts], starts[firsts], stops[lasts]], axis=1).astype(np.int64), range_of_member
