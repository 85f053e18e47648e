"""What every model must offer to training, generation and the report (``Model``), and what generation alone needs.

A model is a ``transformers.PreTrainedModel`` (its ``config``, ``generation_config``, ``save_pretrained``,
``from_pretrained`` and, for beam search, ``generate`` are used) whose class stands in ``mmcot/models/opening.py``.
Beyond that:
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from mmcot.models.bridge import AttentionMaps


class Decoder(Protocol):
    """Rows that are decoded together; each has its own source and position. Rows in use are the first ones.

    It is used for one set of sources after the other; a row that is not in use may hold anything.
    """

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """How many tokens a row can read."""
        ...

    def admit(self, rows: Sequence[int], states: Sequence[Any]) -> list[int]:
        """Assign each of some rows to what ``read`` returned of a source.

        Rows that are assigned to the same object share a source, whose keys and values are computed once.

        Returns:
            the token that each of these rows reads at position 0.
        """
        ...

    def move(self, row: int, *, to: int, num_positions: int) -> None:
        """Copy the source and the first ``num_positions`` tokens of ``row`` to the row ``to``."""
        ...

    def step(self, token_ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read a token in each of the first rows; returns logits [rows, vocabulary] of the next."""
        ...

    def score(self, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-probability of every token of texts, each after what ``read`` returned of its source.

        No row is used for it.
        """
        ...


@runtime_checkable
class GreedyDecoder(Decoder, Protocol):
    """A decoder that chooses the next token itself, so that the host need not wait for every token."""

    def write_greedily(self, num_tokens: int, *, num_rows: int, num_positions: int) -> Callable[[], list[list[int]]]:
        """Begin to choose the next ``num_tokens`` tokens of each of the first rows and read all but the last.

        A row begins with the token that ``admit`` returned for it. It does not end: what follows its end is the
        caller's to drop. After ``step`` has chosen for some rows, ``resume`` comes first.

        Args:
            num_positions: tokens that the row with most of them will have read.

        Returns:
            a function that waits for the tokens of each row and returns them, called before any other method.
        """
        ...

    def resume(self, token_ids: Sequence[int], positions: Sequence[int]) -> None:
        """Give the token that each of the first rows reads next, and its position, before ``write_greedily``."""
        ...


class GenerativeModel(Protocol):
    """What generation needs of a model."""

    config: Any
    generation_config: Any
    generate: Any

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and of the features."""
        ...

    def read(self, **inputs: torch.Tensor) -> list[Any]:
        """For each row of ``input_ids``, ``attention_mask`` and vision features: what the decoder admits.

        The inputs are on the host, in page-locked memory for a GPU, or on the model's device.
        """
        ...

    def open_reader(self) -> Callable[..., list[Any]]:
        """``read`` with weights prepared for many calls; the weights must not change afterwards."""
        ...

    def open_decoder(self, *, num_rows: int, max_source_tokens: int, max_new_tokens: int) -> Decoder:
        """A decoder for what ``read`` returns for sources of at most ``max_source_tokens`` tokens."""
        ...


class Model(GenerativeModel, Protocol):
    """A model of text and vision features."""

    @property
    def new_parts(self) -> tuple[str, ...]:
        """Prefixes of the names of parameters that are not the pretrained language model's.

        Freezing the backbone and the learning rate of the fusion go by it.
        """
        ...

    def __call__(self, **inputs: Any) -> Any:
        """The forward pass of a block; ``.logits`` [B, T, vocabulary] stand at the positions of its labels.

        With ``summed_labels`` [B, T], -100 where there is no target, ``.loss`` is the sum of their cross-entropies.
        """
        ...

    def forward_flops(self, source_lengths: Sequence[int], target_lengths: Sequence[int], *, num_patches: int) -> float:
        """Operations of the matrix products of a forward pass, padding left out; 0 patches: text alone."""
        ...

    def attention_maps(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        vision_features: torch.Tensor,
        vision_mask: torch.Tensor | None = None,
    ) -> AttentionMaps | None:
        """Attention of text to patches, for the report; None where the model has none."""
        ...

    def observe(self, inputs: Mapping[str, torch.Tensor] | None) -> None:
        """Measure for ``watch`` in the forward passes of these inputs, or in none."""
        ...

    def watch(self) -> dict[str, float]:
        """What was measured since the last call, by the name of a metric."""
        ...
