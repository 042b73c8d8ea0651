#!/usr/bin/env python3
"""How Kvern's speed grows with the batch and falls with the context: a table and a plot in docs/performance.md.

One run of `kvern bench` in which all points take turns. A point whose sequences together hold more than --tokens-max tokens is
left out, as its contexts would take long to fill.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from bench import record
from bench.llama_cpp import environment
from bench.quiet import Quiet, measured

STREAMS = (1, 2, 4, 8, 16, 32, 64)
# The last ones leave room for the steps within a context of 8,192.
CONTEXTS = (128, 512, 2048, 8128)
PROMPTS = (128, 512, 2048, 8128)
STEPS = 16
PLOT = record.DOCUMENT.parent / "scaling.svg"


def decode_name(streams: int, context: int) -> str:
    return f"decode {streams}x{context}"


def measure(options: argparse.Namespace) -> "tuple[dict, float]":
    """Each workload's line by its name, and the cores that others used meanwhile."""
    grid = [f"{streams}x{context}" for context in CONTEXTS for streams in STREAMS
            if streams * context <= options.tokens_max]
    command = [str(options.kvern), "bench", str(record.default_model()), "--threads", str(options.threads), "--json",
               "--rounds", str(options.rounds), "--steps", str(STEPS), "--prefill", ",".join(map(str, PROMPTS)),
               "--decode", ",".join(grid)]
    Quiet(options.quiet_wait).settle()
    others, output = measured(command)
    return {line["workload"]: line for line in map(json.loads, output.splitlines())}, others


def tables(found: dict) -> str:
    def cell(name: str) -> str:
        return record.spread(found[name]["rounds"]) if name in found else "-"

    decode = [[str(streams), *(cell(decode_name(streams, context)) for context in CONTEXTS)] for streams in STREAMS]
    prefill = [[str(tokens), cell(f"prefill {tokens}")] for tokens in PROMPTS]
    return (record.table(["streams", *(f"context {context}" for context in CONTEXTS)], decode) + "\n\n" +
            record.table(["prompt", "prefill"], prefill))


def plot(found: dict, headline: str) -> None:
    """Runs in the environment that has matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    # Equal figures give an equal file, and text stays text.
    matplotlib.rcParams.update({"svg.hashsalt": "kvern", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for context in CONTEXTS:
        points = [(streams, found[decode_name(streams, context)]["median"]) for streams in STREAMS
                  if decode_name(streams, context) in found]
        left.plot(*zip(*points), marker="o", label=f"context {context}")
    left.set(title="decode, all streams together", xlabel="streams", ylabel="tokens/s", xscale="log")
    left.set_xticks(STREAMS, STREAMS)
    left.minorticks_off()
    left.legend()
    right.plot(PROMPTS, [found[f"prefill {tokens}"]["median"] for tokens in PROMPTS], marker="o")
    right.set(title="prefill", xlabel="tokens of the prompt", ylabel="tokens/s", xscale="log")
    right.set_xticks(PROMPTS, PROMPTS)
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.text(0.01, 0.01, headline, fontsize=6, color="0.4")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(PLOT, metadata={"Date": None})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens-max", type=int, default=131_072)
    parser.add_argument("--quiet-wait", type=float, default=30.0, help="seconds to wait for a quiet machine at the start")
    parser.add_argument("--kvern", type=pathlib.Path, help="a Kvern that is built already")
    parser.add_argument("--plot", type=pathlib.Path, help="only draw the plot of this result")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.plot:
        result = json.loads(options.plot.read_text())
        return plot(result["lines"], result["headline"])
    options.kvern = options.kvern or record.release_binary()
    python = environment(record.ROOT / "target" / "peer", record.ROOT / "scripts" / "requirements-peer.txt")
    about = record.about(options.threads)
    found, others = measure(options)
    path = record.save("bench-scaling", {**about, "headline": record.headline(about), "others_cores": others, "lines": found})
    text = (f"{record.headline(about)} SmolLM2-135M-Instruct Q4_1; tokens/s of all streams together, median (least to most) "
            f"of {options.rounds} rounds; other processes used {others:.2f} cores meanwhile.\n\n{tables(found)}\n\n"
            f"![tokens per second over streams, contexts and prompts]({PLOT.name})")
    print(text)
    subprocess.run([str(python), __file__, "--plot", str(path)], check=True)
    record.write_section("scaling", text)
    print(f"every round: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
