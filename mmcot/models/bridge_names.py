"""The names of the built-in bridges and resamplers, readable without torch."""

from mmcot.errors import InputError

BUILT_IN = ("gated_cross_attention",)
RESAMPLER_NAMES = ("none", "linear", "mean", "pool", "perceiver", "qformer", "vit")


def tokens_of_picture(resample: str, *, num_patches: int, media_tokens: int) -> int:
    """K, the media tokens of a picture: ``linear`` has one for each patch, others as many as are asked."""
    return num_patches if resample == "linear" else media_tokens


def check_bridge(name: str) -> str:
    """Return ``name`` if ``BRIDGES`` of ``mmcot/models/fusion.py`` has it; other than built-in names import torch.

    Raises:
        ValueError: there is no such bridge.
    """
    if name in BUILT_IN:
        return name
    from mmcot.models.fusion import BRIDGES

    if name not in BRIDGES:
        raise InputError(f"fusion {name!r} is unknown; expected one of {', '.join(sorted(BRIDGES))}")
    return name
