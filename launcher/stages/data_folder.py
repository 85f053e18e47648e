"""A finished data folder: its place and its manifests."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_shards.atomic_files import fingerprint
from data_shards.json_shapes import read_record
from data_shards.manifest import read_manifest
from data_shards.mirror import local_folder, origin_of
from launcher.config.settings import Data, Settings, SettingsError
from mmcot.vision.encoder_kinds import ENCODERS
from mmcot.vision.patches import patch_shape


@dataclasses.dataclass(frozen=True)
class DataFolder:
    """A finished data folder: its place and its manifests.

    ``path`` is on this machine; ``location`` is the same path, or the URL that ``path`` mirrors,
    for other machines.
    """

    path: Path
    text: dict[str, Any]
    features: dict[str, Any] | None

    @property
    def location(self) -> str:
        """Absolute path or URL."""
        return origin_of(self.path) or str(self.path.absolute())

    @property
    def is_remote(self) -> bool:
        """Whether the folder is behind a URL."""
        return origin_of(self.path) is not None

    @property
    def ceilings(self) -> dict[str, Any] | None:
        """Accuracy bounds of a generated data set, or None."""
        return self.text["ceilings"]

    def fingerprints(self) -> dict[str, Any]:
        """The fingerprints of the data that results depend on."""
        return {
            "text_fingerprint": self.text["fingerprint"],
            "features_fingerprint": self.features["fingerprint"] if self.features else None,
        }


def open_data(data: Data, shards_dir: str | Path) -> DataFolder:
    """Open a finished data folder."""
    shards_dir = Path(shards_dir)
    text = read_manifest(shards_dir / "text")
    features = read_manifest(shards_dir / "features" / data.features) if data.features else None
    if features and features["text_fingerprint"] != text["fingerprint"]:
        raise SettingsError(
            f"{shards_dir}/features/{data.features} was built for other text shards; delete that folder and build it "
            "again"
        )
    shape = ENCODERS[data.features].shape if data.features in ENCODERS else None
    if data.features == "patch":
        shape = patch_shape(data.picture_size, data.square_size)
    if features and shape and features["num_patches"] != (wanted := shape[0] * data.max_pictures):
        raise SettingsError(
            f"{shards_dir}/features/{data.features} has {features['num_patches']} patches, data.max_pictures "
            f"({data.max_pictures}) needs {wanted}; delete that folder and build it again, or set data.max_pictures "
            + ("back, and data.picture_size and data.square_size" if data.features == "patch" else "back")
        )
    return DataFolder(shards_dir, text, features)


def is_indexed(shards_dir: str | Path) -> bool:
    """Whether a data folder was made by indexing a user's own tars."""
    path = Path(shards_dir) / "inputs.json"
    remedy = f"restore it, or delete {shards_dir} and build it again"
    return path.exists() and "indexed" in read_record(path, dict, remedy=remedy)


def tokenizer_fingerprint(settings: Settings, shards_dir: str | Path) -> str:
    """Return the id of a pretrained tokenizer, or a hash of the trained one."""
    if settings.model.pretrained:
        return settings.model.pretrained
    folder = local_folder(shards_dir, settings.data.cache_dir, features=settings.data.features)
    remedy = f"restore it, or delete {folder}/tokenizer and build it again with `mmcot data shard`"
    return fingerprint(read_record(folder / "tokenizer" / "tokenizer.json", dict, remedy=remedy))
