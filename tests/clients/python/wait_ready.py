"""Waits until a server is ready: `wait_ready.py BASE_URL SECONDS PID`. Fails at once when the process has ended."""

import os
import sys
import time
import urllib.error
import urllib.request

POLL_S = 0.1


def main() -> None:
    base_url, seconds, pid = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(base_url + "/health/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass  # Not listening yet, or still loading (503).
        with open(f"/proc/{pid}/stat") if os.path.isdir("/proc/self") else open(os.devnull) as stat:
            if stat.read().rpartition(")")[2].split()[:1] == ["Z"]:
                sys.exit("the server ended before it was ready")
        time.sleep(POLL_S)
    sys.exit(f"the server was not ready within {seconds:.0f} s")


if __name__ == "__main__":
    main()
