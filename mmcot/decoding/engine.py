"""What a process needs to write texts with one model, made once and used for any number of sets of sources.

    engine = open_engine(model, num_rows=64, max_source_tokens=512, max_new_tokens=256)
    generate_texts(model, tokenizer, sources, features, ..., engine=engine)

It holds the decoder's packed weights and cache and, on a GPU, the captured graphs: the model's weights, dtype and
device must not change afterwards. What is written does not depend on what the engine was used for before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mmcot.models.contract import Decoder, Model


@dataclasses.dataclass(frozen=True, slots=True)
class Engine:
    """A model's encoder (``Model.read``) and decoder."""

    read: Callable[..., list[torch.Tensor]]
    decoder: Decoder

    def check_sizes(self, *, num_rows: int, max_new_tokens: int) -> None:
        """Raise ValueError where the decoder is too small."""
        decoder = self.decoder
        if num_rows > decoder.num_rows or max_new_tokens > decoder.max_new_tokens:
            raise ValueError(
                f"{num_rows} rows of {max_new_tokens} tokens are requested, the engine was opened for "
                f"{decoder.num_rows} rows of {decoder.max_new_tokens}; open a larger one"
            )


def open_engine(model: Model, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> Engine:
    """Prepare a model for sources and texts of at most these lengths, ``num_rows`` of them at a time."""
    decoder = model.open_decoder(num_rows=num_rows, max_source_tokens=max_source_tokens, max_new_tokens=max_new_tokens)
    return Engine(model.read, decoder)
