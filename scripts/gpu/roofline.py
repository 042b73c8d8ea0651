#!/usr/bin/env python3
"""Runs `kvern bench` on a GPU and divides by what the GPU can do, measured by torch before and after in the same run.

Two limits: bytes per second of reading large tensors (the best of several ways), and operations per second of products
of random bf16 matrices (the best of several sizes). What a step must read and multiply is counted from the model's
configuration: weights once, K and V of every stream, two operations per weight and token, and attention. The floor of
a step is the longer of the two times; the last column says how many floors it took.

With --aims the output says of each aim for a model of 8B whether it was met, and a missed one fails; of a prompt that was
computed with several kernels of attention the fastest counts, and what was not measured is missed.

With --again NAME=FLAG decoding alone is measured under a further flag of the bench, between two runs without it, so
that what the flag changes can be told from what the machine's clocks do: a row each, called before, NAME and after.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import subprocess
import sys

STEPS = 32
DECODE = ["1x1024", "32x4096", "256x1024"]
PREFILL = ["2048", "8192"]
ROUNDS = 20
# Aims for a model of 8B: the share of its limit that a workload has to reach, and the aim in words. The limit is its floor; of
# prompts, whose floor is that of their products and their attention's, it is the rate of products.
AIMS = {
    "decode 1x1024": (1 / 1.15, "at most 1.15 floors"),
    "decode 32x4096": (0.80, "at least 80% of the roofline"),
    "decode 256x1024": (0.80, "at least 80% of the roofline"),
    "prefill 2048": (0.65, "at least 65% of the rate of products"),
    "prefill 8192": (0.65, "at least 65% of the rate of products"),
}
SIZES = [(8192, 8192, 8192), (4096, 28672, 4096), (8192, 6144, 4096), (16384, 4096, 14336)]


def limits() -> dict:
    """Measured by torch: bytes read, bytes moved by a copy, and operations of bf16 products, per second."""
    import torch

    def best(work) -> float:
        """Seconds of one run, the median of several."""
        for _ in range(3):
            work()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize()
        return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1e3

    torch.manual_seed(1)
    free, _ = torch.cuda.mem_get_info()
    elements = min(1 << 31, free // 4 // 4)
    numbers = torch.empty(elements, dtype=torch.float32, device="cuda").normal_()
    size = numbers.numel() * numbers.element_size()
    rows = numbers.view(torch.bfloat16)[:numbers.numel() * 2 // 8192 * 8192].view(-1, 8192)
    vector = torch.randn(8192, dtype=torch.bfloat16, device="cuda")
    reads = {"sum": numbers.sum, "max": numbers.amax, "product with a vector": lambda: rows @ vector}
    read = {name: size / best(work) for name, work in reads.items()}
    half = numbers[:numbers.numel() // 2]
    copy = 2 * half.numel() * half.element_size() / best(lambda: numbers[-half.numel():].copy_(half))
    del numbers, rows, half, reads
    torch.cuda.empty_cache()
    rates = {}
    for m, n, k in SIZES:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
        rates[f"{m}x{n}x{k}"] = 2 * m * n * k / best(lambda x=x, w=w: x @ w.t())
    return {"read": read, "copy": copy, "product": rates, "gpu": torch.cuda.get_device_name()}


def measured_limits() -> dict:
    """In a process of its own, so that its memory is free again."""
    done = subprocess.run([sys.executable, __file__, "--limits-only"], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"expected torch to measure the limits, found that it ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Model:
    """What a forward pass must do, in bf16."""

    layers: int
    # Weights of one layer's products, and of the head.
    layer: int
    head: int
    # Heads times their size: of queries, and of keys or values.
    q: int
    kv: int
    # Of a head.
    size: int

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Model":
        config = json.loads((folder / "config.json").read_text())
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        q, kv = heads * size, config["num_key_value_heads"] * size
        layer = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * config["intermediate_size"]
        return cls(config["num_hidden_layers"], layer, hidden * config["vocab_size"], q, kv, size)

    def decode(self, streams: int, context: float) -> "tuple[float, float]":
        """Bytes and operations of a step."""
        weights = self.layers * self.layer + self.head
        positions = streams * context * self.layers
        return 2 * (weights + positions * 2 * self.kv), 2 * streams * weights + 4 * positions * self.q

    def prefill(self, tokens: int) -> "tuple[float, float]":
        """Bytes and operations of a prompt; of the last token alone the head."""
        weights = self.layers * self.layer
        attention = 4 * self.q * self.layers * tokens * (tokens + 1) / 2
        return 2 * (weights + self.head), 2 * (tokens * weights + self.head) + attention


def bench(options) -> "list[dict]":
    """One run of all workloads, or one of the prompts more for each further kernel of their attention."""
    kernels = options.prefill_kernel or ["auto"]
    prefill = options.prefill or PREFILL
    rows = run_bench(options, options.decode or DECODE, prefill, kernels[0])
    for kernel in kernels[1:]:
        rows += run_bench(options, [], prefill, kernel)
    return rows


def run_bench(options, decode: "list[str]", prefill: "list[str]", kernel: str, *flags: str) -> "list[dict]":
    command = [str(options.kvern), "bench", str(options.model), "--device", options.device, "--json", "--rounds",
               str(options.rounds), "--steps", str(STEPS), "--prefill-attention", kernel]
    command += [flag for point in decode for flag in ("--decode", point)]
    command += [flag for point in prefill for flag in ("--prefill", point)]
    done = subprocess.run([*command, *options.flag, *flags], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"kvern bench ended with {done.returncode}")
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for row in rows:
        if kernel != "auto" and row["workload"].startswith("prefill "):
            row["workload"] += f" {kernel}"
    return rows


def again(options) -> "list[dict]":
    """Decoding without, with and without a further flag."""
    name, _, flag = options.again.partition("=")
    runs = ("before", []), (name, [flag]), ("after", [])
    decode = options.decode or DECODE
    return [dict(row, run=run) for run, flags in runs for row in run_bench(options, decode, [], "auto", *flags)]


def floor(model: Model, workload: str, read: float, product: float) -> "tuple[int, float, str]":
    """Tokens of one step or prompt, the seconds that it must take, and what bounds it."""
    if found := re.fullmatch(r"decode (\d+)x(\d+)", workload):
        streams, context = map(int, found.groups())
        tokens, (moved, operations) = streams, model.decode(streams, context + STEPS / 2)
    elif found := re.fullmatch(r"prefill (\d+)(?: \w+)?", workload):
        tokens = int(found[1])
        moved, operations = model.prefill(tokens)
    else:
        sys.exit(f"expected a workload of decode or prefill, found {workload!r}")
    times = (moved / read, "reads"), (operations / product, "products")
    return tokens, *max(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limits-only", action="store_true", help="print the limits as JSON and run nothing else")
    parser.add_argument("--kvern", type=pathlib.Path, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, help="folder with config.json, and weights if they are read")
    parser.add_argument("--device", default="cuda:0", help="device of the bench")
    parser.add_argument("--decode", action="append", help=f"STREAMSxCONTEXT [default: {' '.join(DECODE)}]")
    parser.add_argument("--prefill", action="append", help=f"tokens [default: {' '.join(PREFILL)}]")
    parser.add_argument("--prefill-kernel", action="append", choices=["portable", "hopper"],
                        help="kernel of prompts' attention; of several, each is measured [default: the server's choice]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each workload")
    parser.add_argument("--flag", action="append", default=[],
                        help="a further flag of kvern bench, as --flag=--load-format=dummy")
    parser.add_argument("--again", metavar="NAME=FLAG",
                        help="measure decoding alone, without, with and without this flag")
    parser.add_argument("--aims", action="store_true", help="fail where an aim for a model of 8B is missed")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    if options.limits_only:
        print(json.dumps(limits()))
        return
    if options.again and not options.again.partition("=")[2]:
        parser.error(f"--again: expected NAME=FLAG, found {options.again!r}")
    if not (options.kvern and options.model):
        parser.error("--kvern and --model are needed")
    before = measured_limits()
    rows = again(options) if options.again else bench(options)
    after = measured_limits()
    read = max(max(side["read"].values()) for side in (before, after))
    product = max(max(side["product"].values()) for side in (before, after))
    if options.out:
        options.out.write_text(json.dumps({"before": before, "after": after, "rows": rows}, indent=1))
    shares = report(options.model, rows, before["gpu"], read, product)
    if options.aims:
        lines, missed = judged(shares)
        print("\n".join(lines))
        if missed:
            sys.exit(f"{missed} of {len(lines)} aims missed")


def judged(shares: "list[tuple[str, float]]") -> "tuple[list[str], int]":
    """A line for each aim, and how many were missed, by workloads and the shares of their floors' pace that they reached."""
    lines, missed = [], 0
    for workload, (least, words) in AIMS.items():
        # The name of a prompt's kernel comes after its tokens.
        reached = max((share for name, share in shares if f"{name} ".startswith(f"{workload} ")), default=None)
        is_met = reached is not None and reached >= least
        missed += not is_met
        found = "found none" if reached is None else f"found {reached:.1%}, {1 / reached:.2f} floors"
        lines.append(f"aim: {workload}: {words}, {found}: {'met' if is_met else 'MISSED'}")
    return lines, missed


def report(folder: pathlib.Path, rows: "list[dict]", gpu: str, read: float, product: float) -> "list[tuple[str, float]]":
    """Prints the table; workloads with the share of their floors' pace that they reached."""
    shares = []
    print(f"{folder.name} on {gpu}; by torch: reads {read / 1e12:.2f} TB/s, products {product / 1e12:.0f} TFLOP/s")
    width = 22 if not any("run" in row for row in rows) else 40
    print(f"{'workload':{width}} {'tokens/s':>10} {'ms':>9} {'floor ms':>9}  bound by   floors")
    model = Model.read(folder)
    points = [row for row in rows if not row["workload"].startswith("limit ")]
    for row in points:
        tokens, seconds, bound = floor(model, row["workload"], read, product)
        took = tokens / row["median"]
        idle = f"  {row['idle_share']:.2%} idle between steps" if "idle_share" in row else ""
        name = f"{row['workload']} {row.get('run', '')}"
        print(f"{name:{width}} {row['median']:10.1f} {took * 1e3:9.3f} {seconds * 1e3:9.3f}  {bound:9} "
              f"{took / seconds:7.2f}{idle}")
        shares.append((row["workload"], seconds / took))
    if not points:
        sys.exit("expected workloads in the output of kvern bench, found none")
    return shares


if __name__ == "__main__":
    main()
