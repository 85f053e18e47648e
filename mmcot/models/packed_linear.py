"""Linear layers whose weights are packed once for many calls with few rows, as decoding makes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

Linear = Callable[[torch.Tensor], torch.Tensor]

# The number of rows for which oneDNN packs weights. Other numbers are correct too, and about as fast.
PACKED_FOR_ROWS = 32


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """Return a function that applies ``weight`` [out, in] and, where one is given, ``bias`` [out].

    On a CPU the weight is packed once in oneDNN's layout. The operators are private to torch:
    where they are missing or do not take this weight, the function uses ``F.linear``. A row of the result of
    a packed weight does not depend on the other rows, bit for bit.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_ROWS)
            apply = torch.ops.mkldnn._linear_pointwise.default
            apply(weight.new_zeros(1, weight.shape[1]), packed, bias, "none", [], "")
        except (AttributeError, NotImplementedError, RuntimeError):
            pass
        else:
            return lambda states: _apply_rows(apply, states, packed, bias)
    return lambda states: F.linear(states, weight, bias)


def _apply_rows(
    apply: Callable[..., torch.Tensor], states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a packed weight to [..., in]. A single row gets a second one, because oneDNN rounds one otherwise."""
    if states.numel() != states.shape[-1]:
        return apply(states, packed, bias, "none", [], "")
    rows = states.reshape(-1, states.shape[-1]).expand(2, -1)
    return apply(rows, packed, bias, "none", [], "")[:1].view(*states.shape[:-1], -1)
