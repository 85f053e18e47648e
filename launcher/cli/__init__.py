"""The command line: a file for each group of commands. Parses, calls, prints.

``launcher.cli:app`` is the command's old name, which the script of an older installation imports.
"""

from launcher.cli.main import app as app
