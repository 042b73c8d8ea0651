"""A peer in a process of its own: its memory is free afterwards, and what it fails of becomes text, not a failure."""

import json
import subprocess
import tempfile
import time

# How much of what a peer said last is worth a row.
REASON_CHARS_MAX = 300


def measure(command: "list[str]", deadline: float) -> dict:
    """The JSON of the last line that `command` prints, or `not_measured` with why there is none.

    `deadline` is of time.monotonic(); a peer still running then is ended."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"not_measured": "no time left"}
    with tempfile.TemporaryFile("w+") as log:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False, timeout=left)
        except subprocess.TimeoutExpired:
            return {"not_measured": f"over {left:.0f} s"}
        last = (done.stdout.splitlines() or [""])[-1]
        if done.returncode == 0 and last.startswith("{"):
            return json.loads(last)
        log.seek(0)
        said = [line.strip() for line in log if line.strip()]
    return {"not_measured": f"status {done.returncode}: {reason(said)}"}


def reason(said: "list[str]") -> str:
    """The line that names an error, the last of them, or else the last line."""
    # Of a traceback the line at the margin; messages of several lines begin with it too.
    named = [line for line in said if line.partition(":")[0].endswith(("Error", "Exception", "Unsupported"))]
    return (named or said or ["no word"])[-1][:REASON_CHARS_MAX]
