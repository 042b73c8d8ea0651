"""How long a server's devices idle between steps, by its /metrics: docs/metrics.md says what counts."""

import asyncio
import dataclasses
import pathlib
import re
import sys
import time

# The folder above this one, in the repository and in the bundle.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
import streaming

# From one reading to the next.
EVERY_S = 0.1
READ_S_MAX = 10
SERIES = {
    "busy_s": "kvern:device_busy_seconds_total",
    "idle_s": "kvern:device_idle_seconds_total",
    "steps_ahead": "kvern:steps_ahead_total",
    "steps": "vllm:iteration_tokens_total_count",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """Sums over all workers, and when they were read, by `time.perf_counter`."""

    at: float
    sums: "dict[str, float]"


def parse(text: str) -> "dict[str, float]":
    """The sums of an exposition; all series have to be there."""
    sums = {}
    for name, series in SERIES.items():
        values = re.findall(rf"^{series}\{{[^\n]*\}} (\S+)$", text, re.MULTILINE)
        if not values:
            raise SystemExit(f"expected {series} in /metrics, found none")
        sums[name] = sum(map(float, values))
    return sums


async def read(port: int) -> Reading:
    content = f"GET /metrics HTTP/1.1\r\nHost: {streaming.HOST}:{port}\r\nConnection: close\r\n\r\n".encode()
    answer = await streaming.fetch(port, content, READ_S_MAX)
    _, _, text = b"".join(chunk for _, chunk in answer.chunks).partition(b"\r\n\r\n")
    return Reading(answer.chunks[-1][0] if answer.chunks else time.perf_counter(), parse(text.decode()))


async def watch(port: int, work) -> "tuple[list[Reading], object]":
    """Reads before, while and after `work` is awaited, and gives its result too."""
    readings = [await read(port)]
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=EVERY_S)
        readings.append(await read(port))
    return readings, await task


def between(readings: "list[Reading]", since: float, until: float) -> "dict | None":
    """What was counted from the first to the last reading in a stretch of time; none where it is too short."""
    within = [reading for reading in readings if since <= reading.at <= until]
    if len(within) < 2:
        return None
    found = {name: within[-1].sums[name] - within[0].sums[name] for name in SERIES}
    known = found["busy_s"] + found["idle_s"]
    return {**found, "wall_s": within[-1].at - within[0].at, "share": found["idle_s"] / known} if known > 0 else None


def line(name: str, found: "dict | None", share_max: float) -> "tuple[str, bool]":
    """What to print of a stretch, and whether its share is within the bound; one that could not be measured is not."""
    if found is None:
        return f"idle between steps, {name}: not measured, as it was too short: FAIL", False
    good = found["share"] <= share_max
    return (f"idle between steps, {name}: {found['share']:.2%} of the device's time ({found['idle_s'] * 1e3:.1f} ms of "
            f"{found['busy_s'] + found['idle_s']:.2f} s; {found['steps_ahead']:.0f} of {found['steps']:.0f} steps were "
            f"planned ahead; at most {share_max:.1%}): {'pass' if good else 'FAIL'}", good)
