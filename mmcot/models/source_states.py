"""What the decoder reads of encoded sources: each source's states without padding, media apart.

    states_to_read(encoder, {"input_ids": ids_BS, "attention_mask": mask_BS}, device, None)    # [states_ND, ...]

Shape suffixes: B sources, S positions of texts, N states that the decoder may read, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mmcot.models.gated_t5 import MediaOfSource


def states_to_read(
    encoder: Callable[..., Any], inputs: Mapping[str, torch.Tensor], device: torch.device, num_media: int | None
) -> list[Any]:
    """The states of each row at the positions of its mask, [N, D], media apart where there are some.

    Inputs may be on the host: then the lengths of sources are known without waiting for the device.
    """
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    outputs = encoder(**on_device)
    states_BND, own_mask_BN = outputs.last_hidden_state, getattr(outputs, "states_mask", None)
    if num_media is not None and own_mask_BN is not None:
        text_BSD, media_BND = states_BND.split([states_BND.shape[1] - num_media, num_media], dim=1)
        text = _rows_of_mask(text_BSD, inputs["attention_mask"].bool())
        media = zip(media_BND, own_mask_BN[:, -num_media:].bool(), strict=True)
        return [MediaOfSource(states_SD, *row) for states_SD, row in zip(text, media, strict=True)]
    return _rows_of_mask(states_BND, (inputs["attention_mask"] if own_mask_BN is None else own_mask_BN).bool())


def _rows_of_mask(states_BND: torch.Tensor, mask_BN: torch.Tensor) -> list[torch.Tensor]:
    """The states of each row at the positions of its mask."""
    lengths = mask_BN.sum(dim=1).tolist()
    if bool((mask_BN[:, 1:] & ~mask_BN[:, :-1]).any()):  # padding is not at the end alone
        first_BN = mask_BN.to(states_BND.device, torch.uint8).argsort(dim=1, descending=True, stable=True)
        states_BND = states_BND.gather(1, first_BN[..., None].expand_as(states_BND))
    return [states_ND[:length] for states_ND, length in zip(states_BND, lengths, strict=True)]
