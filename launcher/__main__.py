"""``python -m launcher`` is ``mmcot``."""

from launcher.cli import app

app(prog_name="mmcot")
