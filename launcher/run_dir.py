"""The old name of ``launcher/runs/run_dir.py``, which the saved state of tunings imports."""

from launcher.runs.run_dir import RunDir as RunDir
