"""Vision features from published encoders: DETR, CLIP, ViT, ResNet, BLIP-2's ViT and SigLIP.

    encoder = VisionEncoder("clip")
    features = encoder.encode([picture])  # float16 [1, 49, 768]

A model is a Hugging Face id or a local folder, of the encoder alone or with any head. A picture is
never cropped: it is resized to the model's square.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from mmcot.errors import InputError, MissingPackageError
from mmcot.pretrained import opening
from mmcot.vision.model_kinds import MODEL_KINDS

_DEFAULT_IMAGE_SIZE = 224  # pixels, for models that take any size


class VisionEncoder:
    """A frozen encoder from pictures to features.

    Args:
        kind: one of ``MODEL_KINDS``: ``detr`` gives its object queries [100, 256], ``clip`` its patches
            without the class token [49, 768], ``vit`` its class token and patches [145, 1024], ``resnet``
            its pooled vector once, [1, 2048], ``blip2`` the class token and patches of its vision model
            [257, 1408], ``siglip`` its patches [196, 768] (shapes of the default models; the published CLIP
            features are of a ResNet tower, [49, 2048], which transformers does not have). The published
            system repeats ResNet's vector 512 times, which gives the same attention output.
        model: a Hugging Face id or a local folder; None for the kind's default.
        device: where the model runs.

    Attributes:
        shape: [P, D] of one picture, measured with one empty picture.
        image_size: side of the model's square in pixels, from its configuration; 224 where that has none.

    Raises:
        ValueError: the kind is unknown, or the model is of another type, is not square or lacks weights.
        ImportError: the model's backbone needs a package that is not installed.
    """

    def __init__(self, kind: str, model: str | Path | None = None, *, device: str = "cpu") -> None:
        if kind not in MODEL_KINDS:
            raise InputError(f"There is no vision encoder {kind!r}; choose one of {', '.join(MODEL_KINDS)}.")
        self.kind, self._kind = kind, MODEL_KINDS[kind]
        self.name = str(model or self._kind.default_model)
        self.device = torch.device(device)
        frozen = cast(Any, self._load().eval().requires_grad_(False))
        self._model = frozen.to(self.device, memory_format=torch.channels_last)
        self.image_size = self._read_image_size()
        self._read_processor()
        _, num_patches, dim = self._features(torch.zeros(1, 3, self.image_size, self.image_size)).shape
        self.shape: tuple[int, int] = (num_patches, dim)

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Convert a picture to the model's input.

        Args:
            image: any size and mode; resized to the model's square as RGB, nothing is cropped.

        Returns:
            float32 [3, H, W] on the encoder's device, scaled to 0..1, then normalised.
        """
        return self._normalise(np.stack([self._squeeze(image)]))[0]

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize a picture to the model's square as RGB; its features are the same. Safe in any thread."""
        return image.convert("RGB").resize((self.image_size, self.image_size), self._resample)

    def __call__(self, images: Sequence[Image.Image]) -> np.ndarray:
        """As ``encode``."""
        return self.encode(images)

    def encode(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Encode pictures in one batch.

        Args:
            images: B pictures of any sizes and modes.

        Returns:
            float16 [B, P, D].

        Raises:
            ValueError: a feature is not finite or too large for float16.
        """
        if not images:
            return np.zeros((0, *self.shape), np.float16)
        features = self._features(self._normalise(np.stack([self._squeeze(image) for image in images])))
        halved = features.half()
        bad = ~torch.isfinite(halved).flatten(1).all(dim=1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise InputError(
                f"{self.kind} features of {self.name!r}: picture {first} of a batch of {len(images)} has values that "
                f"are NaN, infinite or beyond float16 (the largest is {features[first].abs().max().item()}); expected "
                f"finite values up to {torch.finfo(torch.float16).max:g}. Check that the checkpoint is whole, or use "
                "another model."
            )
        return halved.cpu().numpy()

    def _squeeze(self, image: Image.Image) -> np.ndarray:
        """Resize a picture to the model's square, uint8 [H, W, 3]."""
        return np.asarray(self.prepare(image))

    def _normalise(self, pixels: np.ndarray) -> torch.Tensor:
        """Normalise uint8 [B, H, W, 3] to float32 [B, 3, H, W] in channels-last memory, fastest for convolutions."""
        on_device = torch.from_numpy(pixels).to(self.device).to(torch.float32)
        return on_device.mul_(self._scale).sub_(self._shift).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def _features(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] to float32 [B, P, D] on the encoder's device."""
        return self._kind.features(self._model, pixels.to(self.device))

    def _load(self) -> PreTrainedModel:
        with opening(self.name, f"the encoder {self.kind}"):
            found = PreTrainedConfig.get_config_dict(self.name, trust_remote_code=False)[0].get("model_type")
        if found not in self._kind.model_types:
            raise InputError(
                f"{self.name!r} is a model of type {found!r}, but the encoder {self.kind!r} reads "
                f"{' or '.join(map(repr, self._kind.model_types))}; name a matching model, such as "
                f"{self._kind.default_model!r}, or another kind ({', '.join(MODEL_KINDS)})."
            )
        try:
            with opening(self.name, f"the encoder {self.kind}"):
                model, report = getattr(transformers, self._kind.model_class).from_pretrained(
                    self.name,
                    trust_remote_code=False,
                    config=getattr(transformers, self._kind.config_class).from_pretrained(
                        self.name, trust_remote_code=False
                    ),
                    dtype=torch.float32,  # the default is the checkpoint's dtype
                    output_loading_info=True,
                    **self._kind.model_settings,
                )
        except ImportError as error:
            if "timm" not in str(error):
                raise
            raise MissingPackageError(
                f"The backbone of {self.name!r} ({self.kind}) is built by timm, which is not installed; "
                "run `pip install timm`."
            ) from error
        # num_batches_tracked has no effect in inference.
        missing = sorted(name for name in report["missing_keys"] if not name.endswith("num_batches_tracked"))
        if missing:
            raise InputError(
                f"{self.name!r} lacks {len(missing)} weights of a {self.kind} encoder, such as {missing[0]!r}; "
                "expected all of them, as transformers would draw them at random. Name a whole checkpoint of this kind."
            )
        return model

    def _read_image_size(self) -> int:
        size = getattr(self._model.config, "image_size", None) or _DEFAULT_IMAGE_SIZE
        sizes = {size} if isinstance(size, int) else set(size)
        if len(sizes) != 1:
            raise InputError(
                f"{self.name!r} ({self.kind}) takes pictures of {size} pixels; expected a square. Use a model with "
                "one `image_size`."
            )
        return sizes.pop()

    def _read_processor(self) -> None:
        """Read mean, std and filter from preprocessor_config.json; the kind gives what the file does not set."""
        with opening(self.name, f"the encoder {self.kind}"):
            found = get_image_processor_config(self.name)
        mean, std = self._kind.mean_and_std
        if found.get("do_normalize", True) is False:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        else:
            mean, std = found.get("image_mean") or mean, found.get("image_std") or std
        mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
        self._scale, self._shift = (1 / (255 * std)).to(self.device), (mean / std).to(self.device)
        own = Image.Resampling[self._kind.resample]
        self._resample = own if found.get("resample") is None else Image.Resampling(found["resample"])
