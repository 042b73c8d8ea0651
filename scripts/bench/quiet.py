"""Commands that are measured: run when the machine is quiet, and again when somebody else was busy meanwhile.

Both sides suffer from other processes, but not alike: threads that wait for each other by spinning lose far more than their
share. The part of the machine that others used while a command ran stands beside its figures.
"""

import os
import pathlib
import subprocess
import sys
import time
from typing import Callable, TypeVar

T = TypeVar("T")

# Part of one core that others may use before a figure counts as disturbed.
OTHERS_MAX = 0.05
ATTEMPTS = 4


class Quiet:
    """Waits up to `wait_s` for a quiet machine before each command."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        # Cores that others used during each measurement that counts.
        self.others: "list[float]" = []

    def run(self, command: "list[str]") -> str:
        """The standard output of `command`."""
        return self.quietest(lambda: measured(command))

    def quietest(self, measure: "Callable[[], tuple[float, T]]") -> "T":
        """What `measure` returns beside the cores that others used, of the attempt during which they were quietest."""
        best = None
        for _ in range(ATTEMPTS):
            self.settle()
            found = measure()
            if best is None or found[0] < best[0]:
                best = found
            if best[0] <= OTHERS_MAX or self.wait_s == 0:
                break
        self.others.append(best[0])
        return best[1]

    def settle(self) -> None:
        """Return when a quarter of a second has passed in which hardly anything ran, or the wait is over."""
        deadline = time.monotonic() + self.wait_s
        while time.monotonic() < deadline:
            before, began = busy_s(), time.monotonic()
            time.sleep(0.25)
            if busy_s() - before <= OTHERS_MAX * (time.monotonic() - began):
                return

    def summary(self) -> dict:
        """How much others disturbed, over all measurements."""
        found = sorted(self.others)
        disturbed = sum(others > OTHERS_MAX for others in found)
        return {"measurements": len(found), "disturbed": disturbed, "others_cores_most": found[-1] if found else 0.0}


def measured(command: list[str], progress: bool = False) -> "tuple[float, str]":
    """Cores that others used while `command` ran, and its output; with `progress` its standard error is shown as it comes."""
    busy, own, began = busy_s(), children_s(), time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None if progress else subprocess.PIPE, text=True, check=False)
    if done.returncode:
        said = f"{done.stdout[-2000:]}{(done.stderr or '')[-4000:]}"
        sys.exit(f"{said}\n{' '.join(command)}: ended with {done.returncode}")
    others = (busy_s() - busy - (children_s() - own)) / (time.monotonic() - began)
    # Time is counted in ticks: over a short command the quotient may exceed what there is.
    return min(max(0.0, others), float(os.cpu_count())), done.stdout


def busy_s() -> float:
    """Seconds that all cores together have worked since the start of the machine; 0 where the system does not tell."""
    stat = pathlib.Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def children_s() -> float:
    times = os.times()
    return times.children_user + times.children_system
