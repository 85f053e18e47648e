"""Models with random weights and random blocks for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from launcher.config.loading import load_settings
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration

TINY_SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
SMALL_SHAPE = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 4, "num_heads": 8, "vocab_size": 1000}
TINY_PATCHES, PATCHES = (7, 12), (145, 1024)  # of a picture: number, width


def shape_of(size: str) -> dict[str, Any]:
    """The shape of a size of the presets ("base", "large"), or "tiny"."""
    return TINY_SHAPE if size == "tiny" else load_settings(preset=f"scienceqa-{size}").model.shape.for_config


def patches_of(size: str) -> tuple[int, int]:
    return TINY_PATCHES if size == "tiny" else PATCHES


def new_model(
    shape: dict[str, Any], *, patches: tuple[int, int], seed: int = 0, device: str = "cpu", dropout: float = 0.0
) -> Any:
    """A model in fp32; the weights on the CPU do not depend on the machine."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {**shape, "dropout_rate": dropout}
    fields |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = MultimodalT5Config(**fields, vision_num_patches=patches[0], vision_dim=patches[1])
    with torch.device(device):
        return T5ForMultimodalGeneration._from_config(config).eval()


def random_batch(
    config: Any, *, rows: int, source: int, target: int, shortest: float = 1 / 3, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Rows of different lengths, the first one full; every third has no picture.

    Args:
        shortest: the least length of a row, relative to the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths, target_lengths = (
        torch.randint(max(1, int(longest * shortest)), longest + 1, (rows,), generator=generator)
        for longest in (source, target)
    )
    lengths[0], target_lengths[0] = source, target
    mask, written = (
        torch.arange(width) < given[:, None] for width, given in ((source, lengths), (target, target_lengths))
    )
    vision = torch.randn(rows, config.vision_num_patches, config.vision_dim, generator=generator)
    vision[2::3] = 0.0
    labels = torch.where(written, torch.randint(2, config.vocab_size, (rows, target), generator=generator), -100)
    return {
        "input_ids": torch.randint(2, config.vocab_size, (rows, source), generator=generator) * mask,
        "attention_mask": mask.long(),
        "vision_features": vision,
        "labels": labels,
    }


def random_sources(
    config: Any, count: int, *, longest: int = 96, new_tokens: int = 64
) -> tuple[list[list[int]], list[np.ndarray], list[int]]:
    """Token ids, features and a limit of new tokens for each of ``count`` sources."""
    random = np.random.default_rng(0)
    lengths, limits = (
        random.integers(longest // 3, longest + 1, count),
        random.integers(new_tokens // 4, new_tokens + 1, count),
    )
    sources = [random.integers(2, config.vocab_size, length).tolist() for length in lengths]
    features = [
        random.standard_normal((config.vision_num_patches, config.vision_dim)).astype(np.float16) for _ in sources
    ]
    return sources, features, limits.tolist()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())
