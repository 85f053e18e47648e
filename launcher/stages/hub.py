"""Pretrained models from the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from launcher.config.loading import preset_names
from launcher.config.settings import SettingsError


def fetch_pretrained(name: str) -> None:
    """Download a Hugging Face model and its tokenizer to this machine, once; nothing for a local folder.

    Raises:
        SettingsError: it is neither on this machine nor available; the message names where to put it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise SettingsError(
                f"model.pretrained {name} has no config.json; give the folder of a saved transformers model"
            )
        return
    if name.count("/") > 1 or name.startswith((".", "~", "/")):  # no id of the Hub
        raise SettingsError(f"model.pretrained {name} does not exist; {_of_run(Path(name))}")
    try:
        snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.bin", "*.model", "*.txt"])
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"model.pretrained {name!r} is no local folder and could not be fetched{offline}: {reason}. "
            f"Put its files into a folder and set model.pretrained to it, or into the cache at {HF_HUB_CACHE}"
        ) from None


def _of_run(folder: Path) -> str:
    """What to do about a folder that does not exist, where it would be the model of a run."""
    if folder.name != "model" or len(folder.parts) < 3:
        return "give the folder of a saved transformers model, or a Hugging Face id"
    run = folder.parents[1]
    how = f"`mmcot run --preset {run.name}`" if run.name in preset_names() else f"the run {run}"
    return f"it is the model that the stage {folder.parent.name} of {how} trains; train that first"
