"""Published feature files of a data set, such as ``vision_features/detr.npy`` with its map from questions to rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_shards.npy import open_npy
from data_shards.ready_made_features import FeatureError, FeaturesOf, ready_made_features
from data_shards.strict_json import read_json_file
from launcher.config.settings import Data, SettingsError
from launcher.data.hub_source import is_on_hub
from mmcot.errors import InputError
from mmcot.file_kinds import fault_of
from mmcot.vision.encoder_kinds import ENCODERS

_EXPECTED = "one array of floats [rows, patches, width]"


def makes_features(data: Data) -> bool:
    """Whether features are made from pictures; if published ones exist, only with data.vision_model."""
    encoder = ENCODERS.get(data.features or "")
    if encoder is None:
        return False
    return encoder.in_driver or data.vision_model is not None or ready_made_file(data) is None


def ready_made_file(data: Data) -> Path | None:
    """Return the published feature file of a data set, such as ``vision_features/detr.npy``, or None."""
    if (data.path is None or is_on_hub(data.path)) and data.vision_features is None:
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
        InputError: a file cannot be read as what it should be, or the map names rows that cannot be.
        FeatureError: the features have another shape than the published ones.
    """
    name, path, map_path = data.require_features(), ready_made_file(data), name_map(data)
    if path is None or not map_path.exists():
        raise SettingsError(
            f"features {name!r} need {_features_folder(data) / name}.npy (or .pth) and {map_path}; put both there, "
            "or set data.features=patch"
        )
    array = _open_array(path)
    if array.ndim == 2:  # one pooled vector a row
        array = array[:, None]
    published = ENCODERS[name].published_shape if name in ENCODERS else None
    if published and tuple(array.shape[1:]) not in (published, (1, published[1])):
        raise FeatureError(
            f"{path} has rows of shape {tuple(array.shape[1:])}, published {name} features have {published}"
        )
    return ready_made_features(array, _read_map(map_path), name=str(path), map_name=str(map_path))


def _open_array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        if (fault := fault_of(path, _EXPECTED)) is not None:
            raise FeatureError(fault)
        return open_npy(path)
    import torch

    from mmcot.torch_files import describe_value, read_torch_file

    tensor = read_torch_file(path, _EXPECTED)
    if not isinstance(tensor, torch.Tensor):
        raise FeatureError(
            f"{path} holds {describe_value(tensor)}, expected {_EXPECTED}; save that alone, with torch.save"
        )
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise FeatureError(f"{path} holds a tensor of {tensor.layout} on {tensor.device}, expected {_EXPECTED}")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise FeatureError(f"{path} holds values of {tensor.dtype}, expected {_EXPECTED}; convert them with .float()")
    tensor = tensor.detach().resolve_conj().resolve_neg()  # of a parameter, or a view
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _read_map(path: Path) -> object:
    try:
        return read_json_file(path)
    except InputError:
        if (fault := fault_of(path, "an object of JSON from questions to rows")) is None:
            raise  # it is JSON, with a key twice or the like
        raise FeatureError(fault) from None
