"""The old name of ``launcher/generation/predictor.py``, which the code inside registered models imports."""

from launcher.generation.predictor import RunPredictor as RunPredictor
