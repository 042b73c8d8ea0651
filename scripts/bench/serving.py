"""A closed-loop load on a server that streams: clients that each send their next request when the last answer is complete.

The client's own use of the cores is part of the result. Prompts are token ids, the same for every server.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import pathlib
import random
import socket
import statistics
import subprocess
import sys
import time

import streaming
from bench.quiet import busy_s

HOST = streaming.HOST
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
        busy, own, used, began = busy_s(), streaming.own_s(), streaming.process_s(process.pid), time.monotonic()
        answers = asyncio.run(asyncio.wait_for(load(server, port, prompts(seed)), RUN_S_MAX))
        wall = time.monotonic() - began
        client = streaming.own_s() - own
        others = busy_s() - busy - client - (streaming.process_s(process.pid) - used)
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


async def load(server: Server, port: int, wanted: "list[list[int]]") -> "list[streaming.Answer]":
    todo = iter(wanted)
    answers: "list[streaming.Answer]" = []

    async def client() -> None:
        for prompt in todo:
            answers.append(await ask(server, port, prompt))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


async def ask(server: Server, port: int, prompt: "list[int]") -> streaming.Answer:
    content = streaming.request(port, server.path, {**server.body, "prompt": prompt})
    return await streaming.fetch(port, content, RUN_S_MAX)


def figures(answers: "list[streaming.Answer]", wall: float) -> dict:
    """Output tokens per second, and times to the first and between tokens in milliseconds."""
    first, gaps = [], []
    for answer in answers:
        found = [(at, json.loads(text)) for at, text in answer.events()]
        counts = [count for _, event in found if (count := tokens_of(event)) is not None]
        if counts[-1:] != [NEW_TOKENS]:
            got = answer.beginning()[:300]
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
