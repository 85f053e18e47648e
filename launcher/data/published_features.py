"""Published feature files of a data set, such as ``vision_features/detr.npy`` with its map from questions to rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_shards.atomic_files import read_json
from data_shards.ready_made_features import FeatureError, FeaturesOf, ready_made_features
from launcher.config.settings import Data, SettingsError
from mmcot.vision.encoder_kinds import ENCODERS


def makes_features(data: Data) -> bool:
    """Whether features are made from pictures; if published ones exist, only with data.vision_model."""
    encoder = ENCODERS.get(data.features or "")
    if encoder is None:
        return False
    return encoder.in_driver or data.vision_model is not None or ready_made_file(data) is None


def ready_made_file(data: Data) -> Path | None:
    """Return the published feature file of a data set, such as ``vision_features/detr.npy``, or None."""
    if data.path is None and data.vision_features is None:
        return None
    found = [_features_folder(data) / f"{data.features}{suffix}" for suffix in (".npy", ".pth")]
    return next((path for path in found if path.exists()), None)


def _features_folder(data: Data) -> Path:
    return Path(data.vision_features) if data.vision_features else Path(data.path or "") / "vision_features"


def name_map(data: Data) -> Path:
    """Return the map from questions to rows, in the folder of the features or of the data set."""
    path = _features_folder(data) / "name_map.json"
    return path if path.exists() or data.path is None else Path(data.path) / "name_map.json"


def open_ready_made(data: Data) -> tuple[FeaturesOf, tuple[int, int]]:
    """Open the published features of a data set; returns what ``ready_made_features`` returns.

    Raises:
        SettingsError: a file is missing.
        FeatureError: the features have another shape than the published ones.
    """
    name, path, map_path = data.require_features(), ready_made_file(data), name_map(data)
    if path is None or not map_path.exists():
        raise SettingsError(
            f"features {name!r} need {_features_folder(data) / name}.npy (or .pth) and {map_path}; put both there, "
            "or set data.features=patch"
        )
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        import torch

        array = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if not isinstance(array, torch.Tensor):
            raise FeatureError(f"{path} holds a {type(array).__name__}, expected one tensor [rows, patches, width]")
        array = array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()
    if array.ndim == 2:  # one pooled vector a row
        array = array[:, None]
    published = ENCODERS[name].published_shape if name in ENCODERS else None
    if published and tuple(array.shape[1:]) not in (published, (1, published[1])):
        raise FeatureError(
            f"{path} has rows of shape {tuple(array.shape[1:])}, published {name} features have {published}"
        )
    return ready_made_features(array, read_json(map_path), name=str(path))
