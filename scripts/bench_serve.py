#!/usr/bin/env python3
"""Scenarios on the real server with the default model: fairness, overload, inter-token latency, separate workers, a long load.

benches/serve starts a server of its own for each scenario and loads it; this runs it in rounds, waits for a quiet machine before
each, and prints one table per scenario: median (least to most) over the rounds, beside the aim. target/bench-serve/result.json
has every figure of every round.

One round of all scenarios but the long load takes about ten minutes; `--only load` takes eleven more. --document writes the
tables of the scenarios that were run. `--scale 0.5` is a quick look whose figures count for nothing. Python 3.9 or later and a Rust
toolchain are needed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from bench import record
from bench.quiet import OTHERS_MAX, Quiet, measured

# Without the long load, which has to be asked for.
SCENARIOS = ("fairness", "overload", "itl", "split")
LONG = "load"
TITLES = {
    "fairness": "Fairness between tenants",
    "overload": "Overload",
    "itl": "Long prompts beside eight decoding streams",
    "split": "Mixed and separate workers",
    "load": "A long mixed load, recorded and replayed",
}
# Of a figure; without a unit it is a ratio or a count.
DIGITS = {"ms": 1, "s": 1, "requests/s": 2, "tokens/s": 0, "MiB": 1, "requests": 0}


def programs(options: argparse.Namespace) -> "tuple[pathlib.Path, pathlib.Path]":
    """The load generator and the server, both built."""
    cargo = os.environ.get("CARGO", "cargo")
    command = [cargo, "bench", "--package", "kvern", "--bench", "serve", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=record.ROOT, stdout=subprocess.PIPE, text=True, check=True)
    artifacts = [json.loads(line) for line in built.stdout.splitlines() if line.startswith("{")]
    (generator,) = [pathlib.Path(found["executable"]) for found in artifacts
                    if found.get("target", {}).get("name") == "serve" and found.get("executable")]
    return generator, options.kvern or record.release_binary()


def run(scenario: str, round_number: int, generator: pathlib.Path, options: argparse.Namespace) -> dict:
    """One run of one scenario, with the cores that others used meanwhile."""
    note(f"{scenario}, round {round_number + 1} of {options.rounds}")
    command = [str(generator), scenario, "--kvern", str(options.kvern), "--model", str(options.model), "--threads",
               str(options.threads), "--seed", str(options.seed + round_number), "--scale", str(options.scale),
               "--seconds", str(options.seconds), *(f"--flag={flag}" for flag in options.flag)]
    if options.record:
        command += ["--record", str(options.record)]
    Quiet(options.quiet_wait).settle()
    others, output = measured(command, progress=True)
    return {**json.loads(output), "others_cores": others}


def shown(rounds: "list[dict]") -> str:
    """The table of one scenario: a row for each figure, or for each setting where figures belong to settings."""
    series: "dict[tuple[str, str], list[dict]]" = {}
    for found in rounds:
        for figure in found["figures"]:
            series.setdefault((figure["row"], figure["name"]), []).append(figure)
    if any(row for row, _ in series):
        return by_setting(series)
    rows = [[name, found[0]["unit"], spread(found), *verdict(found)] for (_, name), found in series.items()]
    return record.table(["what", "unit", "found", "aim", "met"], rows)


def by_setting(series: "dict[tuple[str, str], list[dict]]") -> str:
    names = list(dict.fromkeys(name for _, name in series))
    units = {name: found[0]["unit"] for (_, name), found in series.items()}

    def cell(found: "list[dict]") -> str:
        aim, met = verdict(found)
        return spread(found) + (f" [{aim}: {met}]" if aim else "")

    head = ["setting", *(f"{name}, {units[name]}" if units[name] else name for name in names)]
    rows = [[row, *(cell(series[row, name]) if (row, name) in series else "" for name in names)]
            for row in dict.fromkeys(row for row, _ in series)]
    return record.table(head, rows)


def spread(found: "list[dict]") -> str:
    values = [figure["value"] for figure in found if figure["value"] is not None]
    if not values:
        return "nothing to measure"
    is_count = not found[0]["unit"] and all(value == int(value) for value in values)
    digits = 0 if is_count else DIGITS.get(found[0]["unit"], 2)
    return record.spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def verdict(found: "list[dict]") -> "tuple[str, str]":
    """The aim and whether the median meets it; both empty where there is none."""
    aim = found[0].get("aim")
    if not aim:
        return "", ""
    ((sense, bound),) = aim.items()
    values = [figure["value"] for figure in found]
    # What could not be measured is not met.
    value = None if None in values else record.median(values)
    met = value is not None and (value <= bound if sense == "at_most" else value >= bound)
    return f"{'<=' if sense == 'at_most' else '>='} {bound:g}", "yes" if met else "no"


def text_of(about: dict, options: argparse.Namespace, results: "dict[str, list[dict]]") -> str:
    runs = [found for rounds in results.values() for found in rounds]
    others = [found["others_cores"] for found in runs]
    disturbed = sum(cores > OTHERS_MAX for cores in others)
    generator = max(found["detail"]["generator_cores"] for found in runs)
    scale = "" if options.scale == 1 else f" Times scaled by {options.scale:g}: a quick look, no result."
    flags = f" Further flags of the server: {' '.join(options.flag)}." if options.flag else ""
    parts = [f"{record.headline(about)} SmolLM2-135M-Instruct Q4_1, seeds from {options.seed}. One round where "
             f"nothing else is said; of several the median (least to most). {disturbed} of {len(runs)} runs were beside other "
             f"processes (at most {max(others):.2f} cores); the load generator used at most {generator:.3f} cores.{flags}{scale}"]
    for scenario, rounds in results.items():
        count = f", {len(rounds)} rounds" if len(rounds) > 1 else ""
        parts += [f"**{TITLES[scenario]}**{count}", shown(rounds)]
        parts += [f"```text\n{found['detail']['replay'][0]}\n```" for found in rounds if "replay" in found["detail"]]
    return "\n\n".join(parts) + "\n"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def scenarios(text: str) -> "list[str]":
        names = text.split(",")
        if not set(names) <= {*SCENARIOS, LONG}:
            raise argparse.ArgumentTypeError(f"expected some of {','.join((*SCENARIOS, LONG))}, found {text}")
        return names

    parser.add_argument("--only", type=scenarios, default=list(SCENARIOS),
                        help=f"some of {','.join((*SCENARIOS, LONG))} (default: all but {LONG})")
    parser.add_argument("--rounds", type=int, default=1, help="each round with a seed of its own")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    parser.add_argument("--seconds", type=float, default=600.0, help=f"time of the scenario {LONG}")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the time of every phase; 1 for results")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the server")
    parser.add_argument("--flag", action="append", default=[], metavar="FLAG",
                        help="a further flag of the server, as in --flag=--max-num-seqs=16; may be repeated")
    parser.add_argument("--record", type=pathlib.Path, help=f"where the scenario {LONG} leaves its record")
    parser.add_argument("--quiet-wait", type=float, default=30.0, help="seconds to wait for a quiet machine before each run")
    parser.add_argument("--kvern", type=pathlib.Path, help="a Kvern that is built already")
    parser.add_argument("--document", action="store_true", help="write the tables into docs/performance.md")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.model = record.default_model()
    generator, options.kvern = programs(options)
    about = record.about(options.threads)
    results: "dict[str, list[dict]]" = {}
    failed = []
    for number in range(options.rounds):
        for scenario in options.only:
            # A scenario that fails does not take the others with it.
            try:
                found = run(scenario, number, generator, options)
            except SystemExit as problem:
                note(f"{scenario}, round {number + 1} failed: {problem}")
                failed.append(scenario)
                continue
            results.setdefault(scenario, []).append(found)
            path = record.save("bench-serve", {**about, "scale": options.scale, "flags": options.flag, "runs": results})
            note(f"every round so far: {path}")
    if results:
        text = text_of(about, options, results)
        print(text)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    if options.document:
        record.write_section("serving", text)


if __name__ == "__main__":
    main()
