#!/usr/bin/env python3
"""Kvern beside llama.cpp: same file, same threads, in turns, on this machine; builds the peer first.

Every figure of one side has the other side's next to it in the same round, and rounds are repeated; ratios are of medians.
The peer runs with the best of its own settings (flash attention on or off, micro-batch of 512 or 2,048), found by a trial
before the rounds. One table is printed; target/bench-peer/result.json has every round.

A full run takes the better part of an hour; --only, --formats, --builds and --rounds take a part. The first run builds llama.cpp
twice. Python 3.9 or later, a Rust toolchain and clang are needed; cmake and ninja come from the package index.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

from bench import record, serving
from bench.llama_cpp import VERSION, Peer, environment
from bench.quiet import Quiet

# Of docs/performance.md: a run of everything, or of a part, with a table of its own.
SECTIONS = ("peer", "peer-formats", "peer-avx2")
PARTS = ("prefill", "decode", "server")
FORMATS = ("Q4_1", "Q8_0", "BF16", "F32")
# File types that are compared where both sides are held to AVX2.
AVX2_FORMATS = ("Q4_1", "Q8_0")
STREAMS = 16
CONTEXT = 128
DECODE_STEPS = 64
STREAM_STEPS = 32


@dataclasses.dataclass(frozen=True)
class Point:
    """A workload, as both sides know it."""

    part: str
    # Kvern's own name.
    name: str
    kvern: tuple
    # The peer's program, arguments, and the settings of which its best counts.
    program: str
    peer: tuple
    settings: tuple


def fa(*more: str) -> "tuple[tuple[str, ...], ...]":
    return tuple(("-fa", flash, *more) for flash in ("on", "off"))


POINTS = (
    Point("prefill", "prefill 512", ("--prefill", "512"), "llama-bench", ("-p", "512", "-n", "0"), fa("-ub", "512")),
    Point("prefill", "prefill 2048", ("--prefill", "2048"), "llama-bench", ("-p", "2048", "-n", "0"),
          fa("-ub", "512") + fa("-ub", "2048")),
    *(Point("decode", f"decode 1x{context}", ("--decode", f"1x{context}", "--steps", str(DECODE_STEPS)), "llama-bench",
            ("-p", "0", "-n", str(DECODE_STEPS), "-d", str(context)), fa()) for context in (CONTEXT, 4096)),
    Point("decode", f"decode {STREAMS}x{CONTEXT}",
          ("--decode", f"{STREAMS}x{CONTEXT}", "--steps", str(STREAM_STEPS)), "llama-batched-bench",
          ("-npp", str(CONTEXT), "-ntg", str(STREAM_STEPS), "-npl", str(STREAMS),
           "-c", str(STREAMS * (CONTEXT + STREAM_STEPS)), "-b", "2048", "-ub", "512"), fa()),
)

# Least ratios, by file type; a file type without any shall be ahead, and at AVX2 not behind.
AIMS = {"Q4_1": {"prefill 512": 4.0, "prefill 2048": 4.0, "decode 1x128": 1.4, "decode 1x4096": 1.5,
                 f"decode {STREAMS}x{CONTEXT}": 4.0}}
# Of the server: how many times better, and the figure's name for people.
SERVER_FIGURES = {"tokens_per_s": (3.0, "output tokens/s"), "ttft_p50_ms": (3.0, "TTFT p50, ms"),
                  "ttft_p99_ms": (None, "TTFT p99, ms"), "itl_p50_ms": (None, "ITL p50, ms")}


@dataclasses.dataclass
class Contest:
    """One point of one file type in one build: what is run, and what came of it."""

    build: str
    stored: str
    point: Point
    kvern: "list[str]"
    peer: "list[str]"
    trials: dict = dataclasses.field(default_factory=dict)
    kvern_rates: "list[float]" = dataclasses.field(default_factory=list)
    peer_rates: "list[float]" = dataclasses.field(default_factory=list)

    def choose(self, quiet: Quiet) -> None:
        """Find the peer's best settings."""
        for settings in self.point.settings:
            self.trials[" ".join(settings)] = peer_rate(quiet.run([*self.peer, *settings]))
        self.peer += max(self.trials, key=self.trials.get).split()

    def round(self, quiet: Quiet, kvern_first: bool) -> None:
        sides = [lambda: self.kvern_rates.append(json.loads(quiet.run(self.kvern))["median"]),
                 lambda: self.peer_rates.append(peer_rate(quiet.run(self.peer)))]
        for side in sides if kvern_first else reversed(sides):
            side()

    def aim(self) -> "tuple[float, str]":
        """The least ratio, and where it is asked."""
        if self.build == "avx2":
            return 1.0, "2, AVX2"
        return (AIMS[self.stored][self.point.name], "1") if self.stored in AIMS else (1.0, "2")

    def result(self) -> dict:
        aim, of = self.aim()
        ratio = record.median(self.kvern_rates) / record.median(self.peer_rates)
        settings = max(self.trials, key=self.trials.get)
        return {"build": self.build, "file": self.stored, "what": self.point.name, "unit": "tokens/s",
                "kvern": self.kvern_rates, "peer": self.peer_rates, "peer_settings": settings, "peer_trials": self.trials,
                "ratio": ratio, "aim": aim, "aim_of": of, "met": ratio >= aim}


def peer_rate(output: str) -> float:
    """Tokens per second from a line of llama-bench or llama-batched-bench."""
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    found = json.loads(line)
    return found["speed_tg"] if "speed_tg" in found else found["samples_ts"][0]


def contests(options: argparse.Namespace, peer: Peer, python: pathlib.Path) -> "list[Contest]":
    found = []
    native = peer.build("native", python)
    for build in options.builds:
        binaries = peer.build(build, python)
        for stored in options.formats:
            if build == "avx2" and stored not in AVX2_FORMATS:
                continue
            model = peer.model(record.default_model(), stored, native)
            for point in POINTS:
                if point.part not in options.only:
                    continue
                isa = ["--cpu-isa", "avx2"] if build == "avx2" else []
                ours = [str(options.kvern), "bench", str(model), *point.kvern, *isa, "--threads", str(options.threads),
                        "--rounds", "1", "--json", "--log-level", "warn"]
                theirs = [str(binaries / point.program), "-m", str(model), "-t", str(options.threads), *point.peer]
                theirs += ["-r", "1", "-o", "jsonl"] if point.program == "llama-bench" else [
                    "-tb", str(options.threads), "--output-format", "jsonl"]
                found.append(Contest(build, stored, point, ours, theirs))
    return found


def limits(options: argparse.Namespace, quiet: Quiet) -> "list[dict]":
    """Kvern's shares of what the machine allows, in one run."""
    command = [str(options.kvern), "bench", str(record.default_model()), "--prefill", "512,2048", "--decode", "1x128",
               "--threads", str(options.threads), "--rounds", str(options.rounds), "--limits", "--json", "--log-level", "warn"]
    return [json.loads(line) for line in quiet.run(command).splitlines()]


def server_results(options: argparse.Namespace, peer: Peer, python: pathlib.Path, quiet: Quiet) -> "list[dict]":
    """The server comparison of the default file, a line per figure."""
    binaries = peer.build("native", python)
    model = record.default_model()
    trials = {}
    for settings in (("-fa", "on"), ("-fa", "off"), ("-fa", "on", "--cache-ram", "0")):
        note(f"llama.cpp's settings: server {' '.join(settings)}")
        server = serving.llama(binaries, model, options.threads, settings)
        trials[settings] = quiet.quietest(lambda: serving.measure(server, 0))["tokens_per_s"]
    settings = max(trials, key=trials.get)
    servers = [serving.kvern(options.kvern, model, options.threads),
               serving.llama(binaries, model, options.threads, settings)]
    found = {server.name: [] for server in servers}
    for number in range(options.rounds):
        for server in servers if number % 2 == 0 else reversed(servers):
            note(f"server, round {number + 1} of {options.rounds}: {server.name}")
            found[server.name].append(quiet.quietest(lambda: serving.measure(server, number + 1)))
    results = []
    for figure, (aim, name) in SERVER_FIGURES.items():
        ours, theirs = ([one[figure] for one in found[server.name]] for server in servers)
        ratio = record.median(ours) / record.median(theirs)
        # Of times, less is better.
        ratio = ratio if figure == "tokens_per_s" else 1 / ratio
        results.append({"build": "native", "file": "Q4_1", "what": f"server: {name}", "unit": name, "kvern": ours,
                        "peer": theirs, "peer_settings": " ".join(settings), "ratio": ratio, "aim": aim,
                        "aim_of": "1" if aim else "", "met": None if aim is None else ratio >= aim})
    results[0].update(peer_trials={" ".join(key): rate for key, rate in trials.items()}, runs=found)
    return results


def shown(results: "list[dict]") -> str:
    def cells(result: dict) -> "list[str]":
        digits = 0 if min(result["peer"]) >= 100 else 1
        aim = "" if result["aim"] is None else f"{result['aim']:g} ({result['aim_of']})"
        met = {True: "yes", False: "no", None: ""}[result["met"]]
        return [result["build"], result["file"], result["what"], record.spread(result["kvern"], digits),
                record.spread(result["peer"], digits), result["peer_settings"], f"{result['ratio']:.2f}", aim, met]

    head = ["build", "file", "what", "Kvern", "llama.cpp", "its settings", "ratio", "aim", "met"]
    return record.table(head, [cells(result) for result in results])


def shares(lines: "list[dict]") -> str:
    rows = [[line["workload"], record.spread(line["rounds"], 1), f"{line['limit_share']:.0%} of {line['limit']}"]
            for line in lines if "limit" in line]
    rows += [[line["workload"], record.spread([rate / 1e9 for rate in line["rounds"]], 1), f"10^9 {line['unit']}"]
             for line in lines if line["workload"].startswith("limit")]
    return record.table(["what", "tokens/s or limit", "share of the limit, or unit"], rows)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def some_of(known: "tuple[str, ...]"):
        def parse(text: str) -> "list[str]":
            names = text.split(",")
            if not set(names) <= set(known):
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, found {text}")
            return names

        return parse

    parser.add_argument("--only", type=some_of(PARTS), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--formats", type=some_of(FORMATS), default=list(FORMATS), help=",".join(FORMATS))
    parser.add_argument("--builds", type=some_of(("native", "avx2")), default=["native", "avx2"], help="native,avx2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quiet-wait", type=float, default=30.0,
                        help="seconds to wait for a quiet machine before each measurement; 0: never wait nor repeat")
    parser.add_argument("--kvern", type=pathlib.Path, help="a Kvern that is built already")
    parser.add_argument("--compiler", default="clang", help="C compiler for llama.cpp")
    parser.add_argument("--peer-source", type=pathlib.Path, help="llama.cpp's source, unpacked already")
    parser.add_argument("--peer-build", type=pathlib.Path, help="folder that holds (or gets) the builds native and avx2")
    parser.add_argument("--document", nargs="?", const="peer", choices=SECTIONS, metavar="SECTION",
                        help="write the tables into docs/performance.md, as one of its sections " + ",".join(SECTIONS))
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.kvern = options.kvern or record.release_binary()
    peer = Peer(record.ROOT, options.compiler, options.peer_source, options.peer_build)
    python = environment(peer.folder, record.ROOT / "scripts" / "requirements-peer.txt")
    quiet = Quiet(options.quiet_wait)
    about = {**record.about(options.threads), "peer": f"llama.cpp of llama-cpp-python {VERSION}, {options.compiler}"}
    contenders = contests(options, peer, python)
    for contest in contenders:
        note(f"llama.cpp's settings: {contest.build} {contest.stored} {contest.point.name}")
        contest.choose(quiet)
    for number in range(options.rounds):
        for contest in contenders:
            note(f"round {number + 1} of {options.rounds}: {contest.build} {contest.stored} {contest.point.name}")
            contest.round(quiet, number % 2 == 0)
    results = [contest.result() for contest in contenders]
    machine = limits(options, quiet)
    if "server" in options.only and "native" in options.builds:
        results += server_results(options, peer, python, quiet)
    noise = quiet.summary()
    result = {**about, "noise": noise, "results": results, "limits": machine}
    text = (f"{record.headline(about)} Peer: {about['peer']}. Median (least to most) of {options.rounds} rounds. Of "
            f"{noise['measurements']} measurements {noise['disturbed']} ran beside other processes (at most "
            f"{noise['others_cores_most']:.2f} cores).\n\n{shown(results)}\n\n{shares(machine)}\n")
    print(text)
    note(f"every round: {record.save('bench-peer', result)}")
    if options.document:
        record.write_section(options.document, text)


if __name__ == "__main__":
    main()
