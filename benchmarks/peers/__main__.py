"""Make the environments of the programs that are measured beside ours: ``python -m benchmarks.peers [NAME...]``."""

from __future__ import annotations

import argparse
import sys

from .environments import CACHE_VARIABLE, DEFAULT_CACHE, PeerError, make, names


def main() -> int:
    epilog = f"They are kept in {DEFAULT_CACHE}; {CACHE_VARIABLE} names another folder."
    parser = argparse.ArgumentParser(description=__doc__, epilog=epilog)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(names())}; all without a name")
    failed = 0
    for name in parser.parse_args().names or names():
        try:
            print(f"{name}: {make(name)}")
        except PeerError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
