"""The old name of ``mmcot/texts/sample.py``, which the code inside registered models imports."""

from mmcot.texts.sample import Sample as Problem  # noqa: F401
