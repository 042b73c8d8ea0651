#!/usr/bin/env python3
"""The server under load: many streams at once, beside transformers' continuous batching with the same prompts' sizes.

Weights are random on both sides, of a shape of this folder's, with the tokenizer of WEIGHTS. Prompts are random tokens,
so that nothing is found in a cache. All streams start together. The ratio compares equal work: where the peer makes
fewer tokens, to save time, the server is asked for as many a second time. Fails where a request fails, where the
ratio is less than the aim, where the peer was asked for and could not be measured, and where the device idles between
steps for more than its bound: over the whole load, or while all streams decode.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

import idle
import made
import server

# The folder above this one, in the repository and in the bundle.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
import streaming

AIM = 3.0
# Part of the device's time.
IDLE_MAX = 0.01
RUN_S_MAX = 400
PEER_S_MAX = 420
# Of continuous batching: what it chooses by itself, then what needs nothing but torch.
ATTENTIONS = (None, "paged|sdpa", "paged|eager")
QUICK = {"streams": 64, "tokens_in": 256, "tokens_out": 128}
FULL = {"streams": 256, "tokens_in": 1000, "tokens_out": 1000}
PEER_OUT = 200
WARM = (8, 8)
# Cores of one Python thread from which on it may be the client that is slow.
CLIENT_CORES_MAX = 0.8
# Where ids that are text begin, in a vocabulary of some size: control tokens are at its start.
TEXT_IDS_FROM = 300


@dataclasses.dataclass
class Stream:
    """One answer: when it was asked for, when its events came, how many tokens they were, and what went wrong."""

    began: float
    times: "list[float]"
    tokens: int
    error: "str | None" = None


class Prompts:
    """Random prompts, each another one."""

    def __init__(self, vocabulary: int, tokens: int, seed: int = 1):
        self.ids = range(min(TEXT_IDS_FROM, vocabulary // 2), vocabulary)
        self.tokens, self.rng = tokens, random.Random(seed)

    def take(self, count: int) -> "list[list[int]]":
        return [self.rng.choices(self.ids, k=self.tokens) for _ in range(count)]


def figures(streams: "list[Stream]", tokens: int) -> dict:
    """Tokens per second, and percentiles in milliseconds, of streams of which each should have so many tokens."""
    good = [stream for stream in streams if not stream.error and stream.tokens == tokens and stream.times]
    errors = sorted({stream.error or f"expected {tokens} tokens, found {stream.tokens}"
                     for stream in streams if stream not in good})
    found = {"streams": len(streams), "tokens_out": tokens, "failed": len(streams) - len(good), "errors": errors[:4]}
    if not good:
        return found
    events = sum(len(stream.times) for stream in good)
    per_event = sum(stream.tokens for stream in good) / events
    wall = max(stream.times[-1] for stream in good) - min(stream.began for stream in good)
    since, until = all_decode(good)
    middle = sum(since < at <= until for stream in good for at in stream.times)
    gaps = [after - before for stream in good for before, after in zip(stream.times, stream.times[1:])]
    return {**found, "wall_s": wall, "tokens_per_s": len(good) * tokens / wall,
            "middle_s": max(0.0, until - since),
            "middle_tokens_per_s": middle * per_event / (until - since) if middle else None,
            "events_per_token": 1 / per_event,
            "ttft_ms": percentiles([stream.times[0] - stream.began for stream in good]), "itl_ms": percentiles(gaps)}


def all_decode(streams: "list[Stream]") -> "tuple[float, float]":
    """While all streams decode: from the last first token to the first last one."""
    with_tokens = [stream.times for stream in streams if stream.times]
    return max(times[0] for times in with_tokens), min(times[-1] for times in with_tokens)


def percentiles(seconds: "list[float]") -> "dict | None":
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {name: cuts[at - 1] * 1e3 for name, at in (("p50", 50), ("p95", 95), ("p99", 99))}


def read(answer: streaming.Answer) -> Stream:
    times, tokens, began = [], 0, answer.began
    for at, text in answer.events():
        if b'"error"' in text and "error" in json.loads(text):
            return Stream(began, times, tokens, text[:300].decode(errors="replace"))
        if b'"choices":[]' in text:
            tokens = json.loads(text)["usage"]["completion_tokens"]
        elif b'"text":""' not in text:
            times.append(at)
    head = answer.beginning()
    if not head.startswith(b"HTTP/1.1 200"):
        said = head.partition(b"\r\n")[0] + b" " + head.partition(b"\r\n\r\n")[2][:300]
        return Stream(began, times, tokens, f"expected status 200, found {said.decode(errors='replace')}")
    return Stream(began, times, tokens)


async def ask(port: int, prompts: "list[list[int]]", tokens: int) -> "list[streaming.Answer]":
    requests = [streaming.request(port, "/v1/completions", body(prompt, tokens)) for prompt in prompts]
    return await asyncio.gather(*(streaming.fetch(port, content, RUN_S_MAX) for content in requests))


def body(prompt: "list[int]", tokens: int) -> dict:
    # Text of special tokens too: an event for every token.
    return {"model": "check", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "skip_special_tokens": False, "stream": True, "stream_options": {"include_usage": True}}


def run(port: int, pid: int, prompts: "list[list[int]]", tokens: int) -> dict:
    """One run of the load, and the cores that client and server used meanwhile."""
    began, own, theirs = time.monotonic(), streaming.own_s(), streaming.process_s(pid)
    readings, answers = asyncio.run(idle.watch(port, ask(port, prompts, tokens)))
    wall = time.monotonic() - began
    client, server_s = streaming.own_s() - own, streaming.process_s(pid) - theirs
    streams = [read(answer) for answer in answers]
    middle = all_decode(streams) if any(stream.times for stream in streams) else (0.0, 0.0)
    return {**figures(streams, tokens), "client_cores": client / wall, "server_cores": server_s / wall,
            "idle": {"the whole load": idle.between(readings, readings[0].at, readings[-1].at),
                     "while all streams decode": idle.between(readings, *middle)}}


def measure(options, folder: pathlib.Path, vocabulary: int) -> "list[dict]":
    """The server's figures for every number of output tokens that is wanted."""
    flags = ["--device", options.device, "--load-format", "dummy", "--max-num-seqs", str(options.max_num_seqs),
             "--max-model-len", str(options.max_model_len), *options.flag]
    lengths = [options.tokens_out]
    if options.peer and options.peer_out != options.tokens_out:
        lengths.append(options.peer_out)
    draw = Prompts(vocabulary, options.tokens_in)
    with server.running(options.kvern, folder, flags, options.logs / "server-load.log") as running:
        ask_warm = ask(running.port, draw.take(min(WARM[0], options.streams)), min(WARM[1], options.tokens_out))
        asyncio.run(ask_warm)
        return [run(running.port, running.process.pid, draw.take(options.streams), tokens) for tokens in lengths]


def peer(options, folder: pathlib.Path) -> dict:
    """The peer's figures, or why there are none; each attempt in a process of its own, so that its memory is free."""
    deadline, reasons = time.monotonic() + options.peer_s_max, []
    for attention in ATTENTIONS:
        command = [sys.executable, str(pathlib.Path(__file__).with_name("peer.py")), str(folder), "--device",
                   options.device, "--streams", str(options.streams), "--in", str(options.tokens_in),
                   "--out-tokens", str(options.peer_out), *(["--attention", attention] if attention else [])]
        name = attention or "its own choice"
        log = options.logs / f"peer-{(attention or 'default').replace('|', '-')}.log"
        try:
            with log.open("w") as output:
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=output, text=True, check=False,
                                      timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {"not_measured": reasons + [f"{name}: over {options.peer_s_max} s for all attempts"]}
        last = done.stdout.splitlines()[-1:] or [""]
        found = json.loads(last[0]) if done.returncode == 0 and last[0].startswith("{") else None
        if found and not found["failed"]:
            return found
        why = f"{found['failed']} failed, {found['errors']}" if found else server.tail(log)[-600:]
        reasons.append(f"{name}: {why}")
    return {"not_measured": reasons}


def report(name: str, found: dict) -> None:
    def cell(of: "dict | None", percentile: str) -> str:
        return f"{of[percentile]:.1f}" if of else "-"

    middle = found.get("middle_tokens_per_s")
    print(f"{name:20} {found['tokens_out']:6} {found.get('tokens_per_s', 0):10.1f} "
          f"{f'{middle:.1f}' if middle else '-':>10} "
          + " ".join(f"{cell(found.get(of), percentile):>9}" for of in ("ttft_ms", "itl_ms")
                     for percentile in ("p50", "p95", "p99")) + f" {found['failed']:6}")


def conclude(options, ours: "list[dict]", theirs: "dict | None") -> bool:
    """Prints all; whether every bound holds."""
    print(f"{options.shape.name}, {options.streams} streams, {options.tokens_in} tokens in; ms")
    print(f"{'':20} {'out':>6} {'tokens/s':>10} {'middle':>10} " + " ".join(
        f"{of + percentile:>9}" for of in ("ttft p", "itl p") for percentile in ("50", "95", "99")) + "  failed")
    for found in ours:
        report("kvern", found)
    if theirs and "not_measured" not in theirs:
        report(f"transformers {theirs['version']}", theirs)
    good = not any(found["failed"] for found in ours)
    for found in ours:
        print("".join(f"  {error}\n" for error in found["errors"]), end="")
    first = ours[0]
    slow = ", so it may be what was slow" if first["client_cores"] > CLIENT_CORES_MAX else ""
    print(f"the client used {first['client_cores']:.2f} cores{slow}, the server {first['server_cores']:.2f}; "
          f"{first.get('events_per_token', 0):.3f} events a token")
    for found in ours:
        for name, stretch in found["idle"].items():
            text, within = idle.line(f"{found['tokens_out']} out, {name}", stretch, options.idle_max)
            print(text)
            good = good and within
    if theirs is None:
        return good
    if "not_measured" in theirs:
        print("peer: not measured\n" + "".join(f"  {reason}\n" for reason in theirs["not_measured"]), end="")
        return False
    ratio = ours[-1].get("tokens_per_s", 0.0) / theirs["tokens_per_s"]
    print(f"at {options.peer_out} tokens out: {ratio:.2f} times transformers with {theirs['attention']} "
          f"(aim {options.aim:g}): {'pass' if ratio >= options.aim else 'FAIL'}")
    return good and ratio >= options.aim


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, required=True, help="the binary")
    parser.add_argument("--shape", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--device", default="cuda:0", help="device of the server, and of the peer")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("."), help="folder for logs")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of the server")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instead of {FULL}, where not given")
    parser.add_argument("--streams", type=int, help="requests, all at once")
    parser.add_argument("--in", dest="tokens_in", type=int, help="tokens of a prompt")
    parser.add_argument("--out-tokens", dest="tokens_out", type=int, help="tokens of an answer")
    parser.add_argument("--max-num-seqs", type=int, help="the server's [default: as many as streams]")
    parser.add_argument("--max-model-len", type=int, default=2048, help="the server's")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    parser.add_argument("--peer-out", type=int, default=PEER_OUT, help="most tokens of the peer's answers")
    parser.add_argument("--peer-s-max", type=float, default=PEER_S_MAX, help="seconds that the peer may take")
    parser.add_argument("--aim", type=float, default=AIM, help="least ratio to the peer's throughput")
    parser.add_argument("--idle-max", type=float, default=IDLE_MAX,
                        help="most of the device's time that may be between steps")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    for name, value in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.max_num_seqs = options.max_num_seqs or options.streams
    options.peer_out = min(options.peer_out, options.tokens_out)
    if options.tokens_in + options.tokens_out > options.max_model_len:
        parser.error(f"expected at most {options.max_model_len} tokens of prompt and answer")
    return options


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        vocabulary = made.folder(options.shape, options.weights, folder)
        ours = measure(options, folder, vocabulary)
        # One after the other: each has the GPU for itself.
        theirs = peer(options, folder) if options.peer else None
    if options.out:
        options.out.write_text(json.dumps({"shape": options.shape.name, "vocabulary": vocabulary, "streams":
                                           options.streams, "tokens_in": options.tokens_in, "kvern": ours,
                                           "transformers": theirs}, indent=1))
    sys.exit(not conclude(options, ours, theirs))


if __name__ == "__main__":
    main()
