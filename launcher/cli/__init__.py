"""The command line; ``app`` is named here as well, where the script ``mmcot`` of an older installation looks for it."""

from launcher.cli.main import app as app
