"""The old name of ``mmcot/texts/problem.py``, which the code inside registered models imports."""

from mmcot.texts.problem import Problem as Problem
