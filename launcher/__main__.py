"""``python -m launcher`` is ``mmcot``."""

from launcher.cli.main import app

app(prog_name="mmcot")
