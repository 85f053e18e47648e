"""The old name of ``launcher/training/launch.py``, which the saved state of tunings imports."""
