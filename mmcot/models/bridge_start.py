"""How the parts of a bridge start inside a T5: at T5's scale, whatever stack of the model they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from mmcot.models.bridge import init_bridge_part
from mmcot.models.fusion import FusionLinear, SingleHeadAttention


class BridgeInitializer(T5PreTrainedModel if TYPE_CHECKING else object):
    """Initialises the parts of a bridge; a mixin, because T5's own method initialises the rest.

    transformers asks the nearest model around a module, so that encoder, decoder and whole model need it alike.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, although the class is not part of transformers.

        For custom code transformers does not initialise modules without own parameters, so T5's attention and
        feed-forward layers would keep the default of a linear layer, a standard deviation of 1 instead of 0.03 to
        0.13. The purpose of that rule is to keep loaded weights, which ``transformers.initialization`` keeps anyway.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (FusionLinear, SingleHeadAttention)):
            _init_fusion_weights(module, self.config.initializer_factor)
        elif getattr(module, "in_bridge", False):
            init_bridge_part(module, self.config.initializer_factor)
        else:
            super()._init_weights(module)


def mark_bridge_parts(*bridges: nn.Module) -> None:
    """Mark all modules of some bridges, for their initialisation."""
    for part in (part for bridge in bridges for part in bridge.modules()):
        object.__setattr__(part, "in_bridge", True)


def _init_fusion_weights(module: FusionLinear | SingleHeadAttention, factor: float) -> None:
    """Initialise by fan-in, as T5 does; transformers' default (std 1) is far too large for a fusion."""
    if isinstance(module, FusionLinear):
        init.normal_(module.weight, mean=0.0, std=factor * module.in_features**-0.5)
        init.constant_(module.bias, module.bias_start)
    else:
        # out_proj, because under ZeRO-3 in_proj_weight has no shape.
        init.normal_(module.in_proj_weight, mean=0.0, std=factor * module.out_proj.in_features**-0.5)
        init.zeros_(module.in_proj_bias)
