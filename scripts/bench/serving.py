"""A closed-loop load on a server that streams: clients that each send their next request when the last answer is complete.

The client keeps what arrives with its time and reads it after the run, so that it hardly takes part in the contest for cores;
its own use of them is part of the result. Prompts are token ids, the same for every server.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import time

from bench.quiet import busy_s

HOST = "127.0.0.1"
READY_S_MAX = 60
RUN_S_MAX = 900
CLIENTS = 8
REQUESTS = 64
PROMPT_TOKENS = 286
SHARED_TOKENS = 200
NEW_TOKENS = 64
# Ids that are text to every vocabulary of some size, away from its control tokens.
IDS = range(300, 20_000)


@dataclasses.dataclass(frozen=True)
class Server:
    """How a server is started and asked."""

    name: str
    # Without the port.
    command: tuple
    health: str
    path: str
    # What a request says beside its prompt.
    body: dict


def kvern(binary: pathlib.Path, model: pathlib.Path, threads: int) -> Server:
    command = (str(binary), "serve", str(model), "--threads", str(threads), "--host", HOST, "--log-level", "warn",
               "--served-model-name", "bench", "--port")
    body = {"model": "bench", "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True}}
    return Server("kvern", command, "/health/ready", "/v1/completions", body)


def llama(binaries: pathlib.Path, model: pathlib.Path, threads: int, settings: "tuple[str, ...]") -> Server:
    command = (str(binaries / "llama-server"), "-m", str(model), "-t", str(threads), "-tb", str(threads), "--host", HOST,
               "-np", str(CLIENTS), "-c", str(CLIENTS * 512), "-cb", "--no-webui", "--log-disable", *settings, "--port")
    # Greedy in the cheapest way that it has.
    body = {"n_predict": NEW_TOKENS, "ignore_eos": True, "samplers": ["top_k"], "top_k": 1, "stream": True,
            "cache_prompt": True}
    return Server("llama.cpp", command, "/health", "/completion", body)


def prompts(seed: int) -> "list[list[int]]":
    """The prompts of a round: a shared beginning, then tokens of their own."""
    rng = random.Random(seed)
    shared = rng.choices(IDS, k=SHARED_TOKENS)
    return [shared + rng.choices(IDS, k=PROMPT_TOKENS - SHARED_TOKENS) for _ in range(REQUESTS)]


def measure(server: Server, seed: int) -> "tuple[float, dict]":
    """Start the server, warm it up with other prompts, run the load, stop it: cores that others used, and the figures."""
    with running(server) as (process, port):
        asyncio.run(load(server, port, prompts(~seed)[:2]))
        busy, own, used, began = busy_s(), own_s(), process_s(process.pid), time.monotonic()
        answers = asyncio.run(asyncio.wait_for(load(server, port, prompts(seed)), RUN_S_MAX))
        wall = time.monotonic() - began
        client = own_s() - own
        others = busy_s() - busy - client - (process_s(process.pid) - used)
    return max(0.0, others / wall), {**figures(answers, wall), "client_cores": client / wall}


@contextlib.contextmanager
def running(server: Server):
    """The process and port of a server that is ready to answer; it is stopped at the end."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*server.command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S_MAX
        while not is_ready(server, port):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{server.name} did not become ready: {' '.join(server.command)} {port}")
            time.sleep(0.05)
        yield process, port
    finally:
        process.terminate()
        process.wait()


def is_ready(server: Server, port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", server.health)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@dataclasses.dataclass
class Answer:
    began: float
    # What arrived, and when.
    chunks: "list[tuple[float, bytes]]"


async def load(server: Server, port: int, wanted: "list[list[int]]") -> "list[Answer]":
    todo = iter(wanted)
    answers: "list[Answer]" = []

    async def client() -> None:
        for prompt in todo:
            answers.append(await ask(server, port, prompt))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


async def ask(server: Server, port: int, prompt: "list[int]") -> Answer:
    body = json.dumps({**server.body, "prompt": prompt}).encode()
    head = (f"POST {server.path} HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
    began = time.monotonic()
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(head.encode() + body)
    chunks = []
    while chunk := await reader.read(1 << 16):
        chunks.append((time.monotonic(), chunk))
    writer.close()
    return Answer(began, chunks)


def events(answer: Answer) -> "list[tuple[float, dict]]":
    """The events of a stream with the time when each was complete."""
    found, line = [], b""
    for at, chunk in answer.chunks:
        *lines, line = (line + chunk).split(b"\n")
        for text in lines:
            if text.startswith(b"data: {"):
                found.append((at, json.loads(text[6:])))
    return found


def figures(answers: "list[Answer]", wall: float) -> dict:
    """Output tokens per second, and times to the first and between tokens in milliseconds."""
    first, gaps = [], []
    for answer in answers:
        found = events(answer)
        counts = [count for _, event in found if (count := tokens_of(event)) is not None]
        if counts[-1:] != [NEW_TOKENS]:
            got = answer.chunks[0][1][:300] if answer.chunks else b"nothing"
            sys.exit(f"expected an answer of {NEW_TOKENS} tokens, found {counts[-1:]}: {got!r}")
        times = [at for at, event in found if text_of(event)]
        first.append(times[0] - answer.began)
        gaps += [after - before for before, after in zip(times, times[1:])]
    percentile = statistics.quantiles(first, n=100, method="inclusive")
    return {"tokens_per_s": len(answers) * NEW_TOKENS / wall, "ttft_p50_ms": statistics.median(first) * 1e3,
            "ttft_p99_ms": percentile[98] * 1e3, "itl_p50_ms": statistics.median(gaps) * 1e3}


def tokens_of(event: dict) -> "int | None":
    """Tokens of the whole answer, in the event that tells it."""
    if event.get("usage"):
        return event["usage"]["completion_tokens"]
    return event["tokens_predicted"] if event.get("stop") else None


def text_of(event: dict) -> str:
    choices = event.get("choices")
    return choices[0]["text"] if choices else event.get("content", "")


def own_s() -> float:
    times = os.times()
    return times.user + times.system


def process_s(pid: int) -> float:
    """Seconds of processor time of a process; 0 where the system does not tell."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return 0.0
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

