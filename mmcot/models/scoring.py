"""The log-probabilities of given texts: one pass of the decoder over all their tokens, without writing them.

Shape suffixes: B texts, N source states, D model width, T target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutput

from mmcot.models.gated_t5 import MediaOfSource


@torch.inference_mode()
def score_texts(model: Any, states: Sequence[Any], texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """The natural logarithm of the probability of every token of texts, under teacher forcing.

    Args:
        model: a T5 of ours.
        states: of each text's source, as ``model.read`` returns them.
        texts: token ids without the decoder's start token; none is empty.
    """
    states_BND, mask_BN = _padded(states)
    configured = model.generation_config.decoder_start_token_id
    start = model.config.decoder_start_token_id if configured is None else configured
    targets_BT = pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(model.device)
    ids_BT = torch.cat([torch.full_like(targets_BT[:, :1], start), targets_BT[:, :-1]], dim=1)
    logits_BTV = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states_BND),
        attention_mask=mask_BN,
        decoder_input_ids=ids_BT,
        use_cache=False,
    ).logits
    found = []
    for logits_TV, targets_T, text in zip(logits_BTV, targets_BT, texts, strict=True):
        logits_TV = logits_TV[: len(text)].float()
        chosen_T = logits_TV.gather(1, targets_T[: len(text), None])[:, 0]
        found.append((chosen_T - logits_TV.logsumexp(dim=-1)).tolist())
    return found


def _padded(states: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, N, D] and their mask [B, N]; media, where there are some, stand behind the text."""
    text = [own.text if isinstance(own, MediaOfSource) else own for own in states]
    states_BND = pad_sequence(text, batch_first=True)
    lengths_B1 = torch.tensor([[len(own)] for own in text], device=states_BND.device)
    mask_BN = (torch.arange(states_BND.shape[1], device=states_BND.device) < lengths_B1).long()
    if isinstance(states[0], MediaOfSource):
        states_BND = torch.cat([states_BND, torch.stack([own.media for own in states])], dim=1)
        mask_BN = torch.cat([mask_BN, torch.stack([own.mask for own in states]).long()], dim=1)
    return states_BND, mask_BN
