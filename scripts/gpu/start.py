#!/usr/bin/env python3
"""How long a start takes: from exec to the port, to ready and to the first token, split by what the log says.

With made-up weights of a shape, with WEIGHTS if there are any, and, if asked, with weights of the shape in files that
were just written. All files are read first, so that they come from the page cache. Medians of several starts.
"""

import contextlib
import datetime
import http.client
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import made
import server

STARTS = 3
POLL_S = 0.002
CHUNK = 1 << 24
# The log's line of a start's phases, as "start: account 0.001 s, weights 2.5 s".
PHASES = re.compile(r"([\w -]+?) (\d+\.\d+) s(?:, |$)")
MEASURED = ("port answers", "ready", "first token")


def first_token(port: int) -> None:
    """Asks for a completion of one token."""
    body = json.dumps({"model": "check", "prompt": server.PROMPTS[0], "max_tokens": 1, "temperature": 0,
                       "ignore_eos": True})
    with contextlib.closing(http.client.HTTPConnection(server.HOST, port, timeout=server.ANSWER_S_MAX)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
    if answer.status != 200 or json.loads(text)["usage"]["completion_tokens"] != 1:
        sys.exit(f"expected a completion of one token, found status {answer.status}: {text[:300]!r}")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((server.HOST, port)) == 0


def one(binary: pathlib.Path, model: pathlib.Path, flags: "list[str]", log: pathlib.Path) -> dict:
    """One start: seconds from exec to each point, and the seconds of each phase of the log."""
    port = server.free_port()
    command = [str(binary), "serve", str(model), "--host", server.HOST, "--port", str(port), "--served-model-name",
               "check", "--log-format", "json", *flags]
    with log.open("w") as output:
        at, began = time.time(), time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            seconds = {}
            for name, reached in zip(MEASURED, (answers, server.is_ready)):
                while not reached(port):
                    if process.poll() is not None:
                        sys.exit(f"the server ended with {process.returncode}:\n{server.tail(log)}")
                    if time.monotonic() - began > server.READY_S_MAX:
                        sys.exit(f"{name}: not after {server.READY_S_MAX} s:\n{server.tail(log)}")
                    time.sleep(POLL_S)
                seconds[name] = time.monotonic() - began
            first_token(port)
            seconds[MEASURED[2]] = time.monotonic() - began
        finally:
            server.stop(process)
    if process.returncode != 0:
        sys.exit(f"expected the server to end with 0 after SIGTERM, found {process.returncode}:\n{server.tail(log)}")
    return {"points": seconds, "phases": phases(log.read_text(errors="replace"), at, seconds[MEASURED[2]])}


def phases(text: str, at: float, total: float) -> dict:
    """The seconds that every phase took, by the log of a server that was started at `at` of the clock; their sum is
    `total`, the time of the first token."""
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    times = [(datetime.datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp() - at,
              line["message"]) for line in lines]
    loaded = next((when for when, message in times if message == "model loaded"), None)
    ready = next((when for when, message in times if message == "ready"), None)
    if loaded is None or ready is None:
        sys.exit(f"expected the lines 'model loaded' and 'ready' in the log, found {[m[:40] for _, m in times]}")
    found = {"to the first line": times[0][0]}
    within = [(when, message) for when, message in times if message.startswith("start: ")]
    if within:
        ended, message = within[0]
        parts = {name: float(seconds) for name, seconds in PHASES.findall(message.removeprefix("start: "))}
        found["tokenizer, device"] = max(0.0, ended - times[0][0] - sum(parts.values()))
        found |= parts
        found["report"] = loaded - ended
    else:
        # A build whose log does not split it.
        found["load"] = loaded - times[0][0]
    return {**found, "publish": ready - loaded, "first token": total - ready}


def warm(folder: pathlib.Path) -> int:
    """Reads all files of a folder, so that they are in the page cache; the bytes of its weights."""
    weights = 0
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(CHUNK):
                    pass
            weights += path.stat().st_size if path.suffix == ".safetensors" else 0
    return weights


def starts(options, name: str, model: pathlib.Path, flags: "list[str]") -> dict:
    size = warm(model)
    flags = ["--device", options.device, *flags, *options.flag]
    runs = [one(options.kvern, model, flags, options.logs / f"server-start-{name}-{number}.log")
            for number in range(options.starts)]
    return {"name": name, "file_bytes": size, "runs": runs}


def report(found: dict) -> float:
    """Prints the table of one kind of weights; its median time to the first token."""
    files = f"{found['file_bytes'] / 1e9:.2f} GB of files in the page cache" if found["file_bytes"] else "no files"
    print(f"{found['name']}, {files}; {len(found['runs'])} starts, seconds")
    print(f"  {'':28} {'median':>9} {'least':>9} {'most':>9}")
    for kind in ("points", "phases"):
        print("  from exec to" if kind == "points" else "  of this")
        for row in found["runs"][0][kind]:
            values = [run[kind].get(row, 0.0) for run in found["runs"]]
            print(f"    {row:26} {statistics.median(values):9.3f} {min(values):9.3f} {max(values):9.3f}")
    return statistics.median(run["points"][MEASURED[2]] for run in found["runs"])


def made_weights(folder: pathlib.Path, device: str) -> None:
    """In a process of its own, so that its memory of the GPU is free again."""
    command = [sys.executable, str(pathlib.Path(__file__).with_name("made.py")), str(folder), "--device", device]
    done = subprocess.run(command, check=False)
    if done.returncode != 0:
        sys.exit(f"expected weights of the shape, found that making them ended with {done.returncode}")
    # Written back first: the disk is not to be busy with them while a start reads.
    os.sync()


def main() -> None:
    parser = server.arguments(__doc__.splitlines()[0])
    parser.add_argument("--shape", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--made", action="store_true", help="also with files of random weights of the shape")
    parser.add_argument("--starts", type=int, default=STARTS, help=f"starts of each kind [default: {STARTS}]")
    parser.add_argument("--first-token-s-max", type=float,
                        help="fail where the median to the first token is longer, of any kind of weights")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        made.folder(options.shape, options.model, folder)
        found.append(starts(options, f"dummy-{options.shape.name}", folder, ["--load-format", "dummy"]))
        if any(options.model.glob("*.safetensors")):
            found.append(starts(options, "weights", options.model, []))
        if options.made:
            made_weights(folder, options.device)
            found.append(starts(options, f"files-{options.shape.name}", folder, []))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    slowest = max(report(kind) for kind in found)
    limit = options.first_token_s_max
    if limit is not None:
        print(f"first token after {slowest:.3f} s at most (limit {limit:g}): {'pass' if slowest <= limit else 'FAIL'}")
    sys.exit(limit is not None and slowest > limit)


if __name__ == "__main__":
    main()
