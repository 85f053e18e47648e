"""The blocks of docs/extending.md: one module of Python, a command, and one file of settings."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXTENSION = "\n".join(block for block in BLOCKS if "launcher.cli" not in block)
COMMAND = next(block for block in BLOCKS if "launcher.cli" in block)
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
