"""Token ids for one set of sources, each with its text; an engine (``mmcot/decoding/engine.py``) does more.

rows = generate_rows(model, sources, features, feature_shape=(100, 256), max_new_tokens=256, num_rows=32,
                     eos_token_ids=[1])
rows[0].ids      # [417, 9, ..., 1]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np

from mmcot.decoding.model_settings import ids_before_text
from mmcot.decoding.row import Row
from mmcot.decoding.rows import Rows, open_rows
from mmcot.decoding.sampling import GREEDY, Sampling
from mmcot.decoding.source_batches import batches_for
from mmcot.errors import InputError
from mmcot.models.contract import GenerativeModel


def generate_ids(
    model: GenerativeModel, sources: Sequence[Sequence[int]], features: Sequence[np.ndarray | None], **options: Any
) -> list[list[int]]:
    """Generate token ids for each source; arguments as for ``generate_rows``.

    Returns:
        ids of each source, in their order, with its prefix, and with the end token where one was generated.
    """
    return [row.ids for row in generate_rows(model, sources, features, **options)]


def generate_rows(
    model: GenerativeModel,
    sources: Sequence[Sequence[int]],
    features: Sequence[np.ndarray | None],
    *,
    feature_shape: tuple[int, int],
    max_new_tokens: int | Sequence[int],
    num_rows: int,
    eos_token_ids: Iterable[int],
    sampling: Sampling = GREEDY,
    keys: Sequence[str] | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
    with_log_probs: bool = False,
    min_new_tokens: int = 0,
    rows: Rows | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Generate one text for each source, ``num_rows`` of them at a time.

    Args:
        features: an array [p, V] for each source, or all None.
        feature_shape: [P, V] with p <= P.
        max_new_tokens: one limit for all, or one for each source.
        eos_token_ids: a text ends with any of these.
        keys: the name by which each source's text draws, where it is sampled.
        prefixes: ids that each source's text has to begin with; they count as new tokens.
        with_log_probs: also return the log-probability of every token.
        min_new_tokens: before so many tokens no end token is chosen.
        rows: of this model, opened for these sizes or larger ones; None opens some for this call.
        on_step: called whenever new tokens of all rows are known.

    Returns:
        a row for each source, in their order.

    Raises:
        ValueError: arguments contradict each other.
    """
    if not sources:
        return []
    limits = [max_new_tokens] * len(sources) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    prefixes = cast("Sequence[Sequence[int]]", [()] * len(sources)) if prefixes is None else prefixes
    if len(prefixes) != len(sources):
        raise InputError(f"prefixes has {len(prefixes)} entries for {len(sources)} sources; give one each, such as ()")
    if sampling.temperature > 0 and keys is None:
        raise InputError(f"sampling (temperature {sampling.temperature}) needs keys; give each question's qid")
    if rows is None:
        rows = open_rows(
            model,
            num_rows=min(num_rows, len(sources)),
            max_source_tokens=max(map(len, sources)),
            max_new_tokens=max(limits),
        )
    ends = frozenset(eos_token_ids)
    written = [
        Row(
            max_new_tokens=limits[index],
            ends=ends,
            index=index,
            sampling=sampling,
            key=keys[index] if keys is not None else "",
            prefix=tuple(prefixes[index]),
            with_log_probs=with_log_probs,
            min_new_tokens=min_new_tokens,
            before=ids_before_text(model, source),
        )
        for index, source in enumerate(sources)
    ]
    rows.check(written)
    rows.add([[row] for row in written], batches_for(model, sources, features, feature_shape=feature_shape))
    while rows:
        rows.step()
        on_step()
    return written
