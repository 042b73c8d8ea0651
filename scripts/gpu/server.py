#!/usr/bin/env python3
"""Starts a server, asks it one thing and stops it: whether a device can be served from, and how long that takes.

Also what the other scripts of this folder start and ask servers with.
"""

import argparse
import contextlib
import json
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

HOST = "127.0.0.1"
READY_S_MAX = 180
ANSWER_S_MAX = 300
STOP_S_MAX = 60
# Short and long; one is longer than many blocks of the cache, and none repeats itself for long.
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three most important rules of chess are",
    " ".join(f"Chapter {n} tells of {subject}." for n, subject in enumerate(
        ["a river", "the old bridge", "two brothers", "a lost letter", "winter", "the mill", "a stranger", "bread",
         "the war", "a garden", "silence", "the sea", "a wedding", "the clock", "debts", "a storm", "an answer"] * 3, 1))
    + " The last chapter tells of",
]


class Server:
    """A server that is ready to answer."""

    def __init__(self, process: subprocess.Popen, port: int, ready_s: float):
        self.process, self.port, self.ready_s = process, port, ready_s

    def complete(self, prompt: "str | list[int]", tokens: int, logprobs: "int | None" = None) -> dict:
        """The first choice of a greedy completion of so many tokens."""
        body = {"model": "check", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
                "logprobs": logprobs}
        request = urllib.request.Request(f"http://{HOST}:{self.port}/v1/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S_MAX) as answer:
                return json.load(answer)["choices"][0]
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            raise SystemExit(f"expected a completion, found status {error.code}: {text}") from error


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(binary: pathlib.Path, model: pathlib.Path, flags: "list[str]", log: pathlib.Path):
    """A server of `model` on a free port, stopped by SIGTERM at the end; its log goes to `log`."""
    port = free_port()
    command = [str(binary), "serve", str(model), "--host", HOST, "--port", str(port), "--served-model-name", "check"]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen([*command, *flags], stdout=output, stderr=output)
        try:
            while not is_ready(port):
                if process.poll() is not None:
                    raise SystemExit(f"the server ended with {process.returncode}:\n{tail(log)}")
                if time.monotonic() - began > READY_S_MAX:
                    raise SystemExit(f"the server was not ready after {READY_S_MAX} s:\n{tail(log)}")
                time.sleep(0.02)
            yield Server(process, port, time.monotonic() - began)
        finally:
            stop(process)
    if process.returncode != 0:
        raise SystemExit(f"expected the server to end with 0 after SIGTERM, found {process.returncode}:\n{tail(log)}")


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S_MAX)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health/ready", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def tail(log: pathlib.Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def arguments(description: str) -> argparse.ArgumentParser:
    """What all scripts take that start servers."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--kvern", type=pathlib.Path, required=True, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder of safetensors, config, tokenizer")
    parser.add_argument("--device", default="cuda:0", help="device of the server")
    parser.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("."), help="folder for the servers' logs")
    parser.add_argument("--flag", action="append", default=[],
                        help="a further flag of the server, as --flag=--max-num-seqs=8")
    return parser


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    log = options.logs / "server-start.log"
    with running(options.kvern, options.model, ["--device", options.device, *options.flag], log) as server:
        choice = server.complete(PROMPTS[0], 16)
        print(f"ready after {server.ready_s:.2f} s; {PROMPTS[0]!r} goes on with {choice['text']!r}")
    if not choice["text"]:
        sys.exit("expected a text, found none")


if __name__ == "__main__":
    main()
