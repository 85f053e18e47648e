"""Features of pictures: equal to the CPU's, and pictures a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from benchmarks.gpu_parts import unjudged
from benchmarks.gpu_parts.machine import DEVICE, ON_GPU, Proof, seconds_of
from benchmarks.gpu_parts.models import relative_error
from mmcot.models.device import open_device
from mmcot.vision.encoders import VisionEncoder

TOLERANCE = 1e-3  # relative; float16, in which features are stored, rounds at 5e-4
BATCH = 64  # pictures, as the product encodes them on a GPU
LARGE: dict[str, Any] = {  # google/vit-large-patch32-384
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 384,
    "patch_size": 32,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 16,
}


def features(proof: Proof) -> dict[str, Any]:
    """ViT-large with random weights, opened as the product opens an encoder."""
    open_device(use_gpu=ON_GPU)
    if not proof.judged:
        torch.backends.cudnn.enabled = False  # such a device need not have cuDNN
        unjudged.encode_any_value()
    folder = proof.folder / "vit"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = transformers.ViTConfig(**(TINY if proof.tiny else LARGE))
        model = transformers.ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    del model
    pictures = random_pictures(4 if proof.tiny else BATCH)
    encoder = VisionEncoder("vit", folder, device=DEVICE.type)
    few = pictures[:2]
    error = relative_error(
        torch.from_numpy(encoder.encode(few)), torch.from_numpy(VisionEncoder("vit", folder).encode(few))
    )
    pixels = torch.stack([encoder.preprocess(picture) for picture in pictures])
    prepared = [encoder.prepare(picture) for picture in pictures]  # by other threads in the product
    whole, on_device = seconds_of(lambda: encoder.encode(prepared), 3), seconds_of(lambda: encoder._features(pixels), 3)
    result = {
        "relative_error": error,
        "shape": list(encoder.shape),
        "pictures_per_s": len(pictures) / whole,
        "pictures_per_s_of_the_model": len(pictures) / on_device,
        "share_of_time_in_the_model": on_device / whole,
    }
    return {
        **result,
        "headline": f"{result['pictures_per_s']:,.0f} pictures/s, the model alone "
        f"{result['pictures_per_s_of_the_model']:,.0f}; error {error:.1e}",
        "checks": {f"features within {TOLERANCE:g} of the CPU's": error <= TOLERANCE},
    }


def random_pictures(count: int) -> list[Image.Image]:
    """Smooth pictures of different sizes."""
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((400 + 10 * (index % 7), 300))
        for index in range(count)
    ]
