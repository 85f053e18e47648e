"""Imported once by the process that loader processes are forked from.

torchrun sends SIGTERM to a rank's whole process group; loader processes must continue until
the rank has written its checkpoint and ends them.
"""

import os

import launcher.training.loader  # noqa: F401, so that every loader process starts with it

os.setpgrp()
