"""The command ``torchrun -m launcher.rank JOB.json``; the code is in ``launcher/training/torchrun.py``."""

import sys

from launcher.training.torchrun import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
