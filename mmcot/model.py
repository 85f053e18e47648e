"""The old name of ``mmcot/models/t5.py``, which defines the model's class."""

from mmcot.models.t5 import T5ForMultimodalGeneration as T5ForMultimodalGeneration
