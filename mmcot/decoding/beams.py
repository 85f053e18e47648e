"""Beam search, by transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import torch

from mmcot.decoding.requests import Request, Source
from mmcot.decoding.source_batches import SourceBatch
from mmcot.models.contract import GenerativeModel


@torch.inference_mode()
def search_beams(
    model: GenerativeModel,
    requests: Sequence[Request],
    batch: Callable[[Sequence[Source]], Iterable[SourceBatch]],
    *,
    limit: int,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The ids of each request's best beam, with the end token, in the order of ``requests``.

    Args:
        batch: makes batches of sources.
        limit: of new tokens, for requests without one of their own.
    """

    def size_of(number: int) -> tuple[int, int]:
        return requests[number].num_beams, requests[number].max_new_tokens or limit

    found: list[list[int]] = [[]] * len(requests)
    for (num_beams, max_new_tokens), group in groupby(sorted(range(len(requests)), key=size_of), key=size_of):
        numbers = list(group)
        for sources in batch([requests[number].source for number in numbers]):
            inputs = {name: tensor.to(model.device) for name, tensor in sources.inputs.items()}
            outputs = model.generate(
                **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=num_beams, use_cache=True
            )
            for index, ids in zip(sources.indices, outputs[:, 1:].tolist(), strict=True):
                found[numbers[index]] = ids
            on_step()
    return found
