"""Starts a command that serves, waits until an address answers, and ends it as Ctrl-C does.

    python tests/helpers/docs_until.py http://127.0.0.1:5000 mmcot mlflow up

Ends with the command's status; with 1 where it ended by itself, or nothing answered within two minutes.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request

PATIENCE_S = 120.0


def main(address: str, command: list[str]) -> int:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    process = subprocess.Popen(command)
    deadline = time.monotonic() + PATIENCE_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                opener.open(address, timeout=10).close()
            except OSError:
                time.sleep(0.3)
                continue
            process.send_signal(signal.SIGINT)
            return process.wait(60)
        print(
            f"{command[0]} ended by itself"
            if process.poll() is not None
            else f"{address} did not answer within {PATIENCE_S:.0f} s",
            file=sys.stderr,
        )
        return 1
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
