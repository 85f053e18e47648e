"""The old name of ``launcher/training/launch.py``, which the saved state of tunings imports."""

from launcher.training.launch import release_workers as free_workers  # noqa: F401, an old name for pickled state
