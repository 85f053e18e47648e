"""Captions of pictures, by a captioning model of transformers.

    Captioner("Salesforce/blip-image-captioning-base").caption(images)   # ["a compass on a map", ...]

Any model that generates text from pixels alone, such as BLIP, GIT or ViT with GPT-2; no chat models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from mmcot.pretrained import opening


class Captioner:
    """A captioning model, opened once.

    Args:
        model: Hugging Face id or folder, with its image processor and tokenizer.
        max_new_tokens: maximum length of a caption.

    Raises:
        InputError: the model cannot be opened.
    """

    def __init__(self, model: str | Path, *, device: str = "cpu", max_new_tokens: int = 40) -> None:
        with opening(model, "the captioning model"):
            self._processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False, use_fast=False)
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            opened = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=False)
        self._model = cast(Any, opened).to(device).eval()
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """Generate a caption for each picture, greedily and on one line."""
        pixels = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt").pixel_values
        ids = self._model.generate(
            pixel_values=pixels.to(self._model.device),
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [" ".join(text.split()) for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)]
