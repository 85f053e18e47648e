"""The blocks of docs/extending.md: one module of Python and one file of settings."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
EXTENSION = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
