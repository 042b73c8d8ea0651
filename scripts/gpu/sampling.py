#!/usr/bin/env python3
"""Sampling alone: `kvern bench --sampling` beside the same by torch's argmax, topk and sort.

Kvern's seconds are of a step as the server has it, two under way: parameters to the device, the kernels, tokens to the host. torch's
are of its kernels alone, on random logits in f32, launched ahead of time; it has no penalties here. Sampling from top-k and top-p is
timed by topk, which bounds k, and by a sort of the whole row.

Fails where a step of Kvern's sampling takes more than the aim of what Llama-3.1-8B's step at least takes at that batch.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

# Rows, and the floor of a step of so many streams on an H200, in seconds.
FLOORS = {1: 3.49e-3, 32: 7.49e-3, 256: 11.5e-3}
AIM = 0.03
KINDS = ["greedy", "temperature", "filtered", "penalties"]
STEPS = 32
WARM, ROUNDS = 3, 20
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95
# GPU cycles for which the timed calls wait in the queue, so that what launching them costs the CPU is not timed.
QUEUE_CYCLES = 100_000_000


def kvern(options) -> "dict[tuple[str, int], float]":
    """Seconds of a step, by kind and rows."""
    command = [str(options.kvern), "bench", str(options.model), "--device", options.device, "--load-format", "dummy", "--json",
               "--rounds", "5", "--steps", str(STEPS)]
    wanted = {f"sampling {kind}:{rows}": (kind, rows) for kind in KINDS for rows in FLOORS}
    command += ["--sampling", ",".join(name.split()[1] for name in wanted), *options.flag]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"kvern bench ended with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {wanted[line["workload"]]: wanted[line["workload"]][1] / line["median"] for line in lines if line["workload"] in wanted}
    if missing := [name for name, key in wanted.items() if key not in found]:
        sys.exit(f"expected {', '.join(missing)} in the output of kvern bench, found none of them")
    return found


def draw(weights):
    """As torch.multinomial of one, without its wait for the host: the largest of weights over exponential numbers."""
    import torch

    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def of_top_k(logits):
    import torch

    values, tokens = logits.topk(TOP_K)
    weights = (values / TEMPERATURE).softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= TOP_P, 0)
    return torch.gather(tokens, -1, draw(weights)[:, None])


def of_sorted(logits):
    import torch

    values, tokens = logits.sort(dim=-1, descending=True)
    values[:, TOP_K:] = -torch.inf
    weights = (values / TEMPERATURE).softmax(-1)
    weights = weights.masked_fill(weights.cumsum(-1) - weights >= TOP_P, 0)
    return torch.gather(tokens, -1, draw(weights)[:, None])


PEERS = [
    ("greedy", "torch argmax", lambda logits: logits.argmax(-1)),
    ("temperature", "torch softmax", lambda logits: draw((logits / TEMPERATURE).softmax(-1))),
    ("filtered", "torch topk", of_top_k),
    ("filtered", "torch sort", of_sorted),
]


def seconds(call, logits) -> float:
    """The median of some rounds."""
    import torch

    for _ in range(WARM):
        call(logits)
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    torch.cuda._sleep(QUEUE_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        call(logits)
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1e3


def peers(options, vocab: int) -> "tuple[str, list[dict]]":
    """The GPU's name, and a row for each of PEERS and number of rows."""
    import torch

    torch.manual_seed(1)
    torch.cuda.set_device(options.device)
    rows = []
    with torch.no_grad():
        for batch in FLOORS:
            logits = torch.randn(batch, vocab, device=options.device) * 2.5
            rows += [{"kind": kind, "rows": batch, "who": who, "seconds": seconds(call, logits)} for kind, who, call in PEERS]
    return torch.cuda.get_device_name(options.device), rows


def report(rows: "list[dict]", ours: "dict[tuple[str, int], float]") -> "list[str]":
    """Prints the table; the aims that were missed."""
    print(f"{'kind':12} {'rows':>5} {'who':16} {'us':>9} {'of floor':>9} {'kvern is':>9}")
    missed = []
    for row in rows:
        key = row["kind"], row["rows"]
        share = row["seconds"] / FLOORS[row["rows"]]
        times = f"{row['seconds'] / ours[key]:8.2f}x" if row["who"] != "kvern" else f"{'-':>9}"
        print(f"{row['kind']:12} {row['rows']:5} {row['who']:16} {row['seconds'] * 1e6:9.1f} {share:9.1%} {times}")
        if row["who"] == "kvern" and share > AIM:
            missed.append(f"{row['kind']}, {row['rows']} rows: expected at most {AIM:.0%} of the floor of a step, found {share:.1%}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, required=True, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="device of the bench, and of torch")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of kvern bench")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    vocab = json.loads((options.model / "config.json").read_text())["vocab_size"]
    ours = kvern(options)
    gpu, theirs = peers(options, vocab)
    own = [{"kind": kind, "rows": rows, "who": "kvern", "seconds": found} for (kind, rows), found in ours.items()]
    rows = sorted(own + theirs, key=lambda row: (KINDS.index(row["kind"]), row["rows"], row["who"] != "kvern"))
    if options.out:
        options.out.write_text(json.dumps({"gpu": gpu, "vocab": vocab, "rows": rows}, indent=1))
    print(f"sampling of {vocab} logits on {gpu}; floors are those of Llama-3.1-8B on an H200")
    if missed := report(rows, ours):
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
