"""Waits until a server is ready: `wait_ready.py BASE_URL SECONDS PID`. Fails at once when the process has ended."""

import os
import pathlib
import sys
import time
import urllib.error
import urllib.request

POLL_S = 0.1


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # An ended process stays visible as a zombie until its parent asks for it.
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True  # No /proc here: only the timeout can tell.


def is_ready(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(base_url + "/health/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False  # Not listening yet, or still loading (503).


def main() -> None:
    base_url, seconds, pid = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    end = time.monotonic() + seconds
    while not is_ready(base_url):
        if not is_running(pid):
            sys.exit("the server ended before it was ready")
        if time.monotonic() > end:
            sys.exit(f"the server was not ready within {seconds:.0f} s")
        time.sleep(POLL_S)


if __name__ == "__main__":
    main()
