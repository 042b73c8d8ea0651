#!/usr/bin/env python3
"""Attention of decoding, one layer of a model's shape: `kvern bench --attention` beside torch's and FlashInfer's.

Queries, K and V are random, in bf16. torch's scaled_dot_product_attention, with each of its kernels, reads K and V that
lie in one piece for each stream, and so takes batches of one context alone; FlashInfer reads pages of 16 tokens,
scattered, and its planning is not timed. Calls take turns between several copies of K and V, so that no cache holds
them. Each peer runs in a process of its own and is compared with softmax in f32 before it is timed; one that is not
there, or fails, is a row with the reason. The share is of the rate of reads that torch reaches before and after in the
same run; of peers whose K and V are repeated for each query head it still counts every byte once.

Fails where Kvern reaches less of that rate than the aims say.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import time

import guarded
import roofline

BATCHES = ["32x4096", "256x1024", "1x131072+31x4096"]
# Least share of the rate of reads.
AIM_UNIFORM, AIM_SKEWED = 0.85, 0.75
SDPA = {"torch flash": "FLASH_ATTENTION", "torch efficient": "EFFICIENT_ATTENTION", "torch cudnn": "CUDNN_ATTENTION"}
FLASHINFER = {"flashinfer": False, "flashinfer tensor cores": True}
PEER_S_MAX, PEERS_S_MAX = 200, 560
STEPS = 8
PAGE = 16
WARM, ROUNDS = 5, 24
# All copies of K and V together: several times the largest cache.
COPIES_BYTES_MIN = 400_000_000
# GPU cycles for which the timed calls wait in the queue, so that what launching them costs the CPU is not timed.
QUEUE_CYCLES = 50_000_000
WORKSPACE_BYTES = 512 << 20
# Outputs are means of thousands of numbers near 1: about 0.03.
DIFFERENCE_MAX = 2e-3


@dataclasses.dataclass(frozen=True)
class Shape:
    """Query heads, heads of K and V, and their size; tokens of every stream."""

    heads: int
    kv_heads: int
    size: int
    contexts: "tuple[int, ...]"

    @classmethod
    def of(cls, model: roofline.Model, batch: str) -> "Shape":
        return cls(model.q // model.size, model.kv // model.size, model.size, contexts(batch))

    @property
    def uniform(self) -> bool:
        return len(set(self.contexts)) == 1

    def bytes(self) -> int:
        """Of K and V, in bf16."""
        return 2 * 2 * self.kv_heads * self.size * sum(self.contexts)

    def copies(self) -> int:
        return max(2, math.ceil(COPIES_BYTES_MIN / self.bytes()))


def contexts(batch: str) -> "tuple[int, ...]":
    """Of `1x131072+31x4096`: tokens of each of the 32 streams."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(\+[1-9]\d*x[1-9]\d*)*", batch):
        raise argparse.ArgumentTypeError(f"expected STREAMSxCONTEXT, joined by +, found {batch!r}")
    groups = (map(int, group.split("x")) for group in batch.split("+"))
    return tuple(context for streams, context in groups for _ in range(streams))


def checked(batch: str) -> str:
    contexts(batch)
    return batch


def random(device: str, *shape: int):
    import torch

    return torch.randn(*shape, dtype=torch.bfloat16, device=device)


def reference(q, k, v):
    """Of one stream in f32: q [heads, size], k and v [tokens, kv_heads, size]; the output is as q."""
    group = q.shape[0] // k.shape[1]
    k, v = (side.float().repeat_interleave(group, dim=1) for side in (k, v))
    scores = (q.float()[None] * k).sum(dim=-1) / math.sqrt(q.shape[1])
    return (scores.softmax(dim=0)[..., None] * v).sum(dim=0)


def compare(found, expected) -> None:
    difference = (found.float() - expected).abs().max().item()
    if not difference <= DIFFERENCE_MAX:
        raise RuntimeError(f"expected outputs within {DIFFERENCE_MAX} of softmax in f32, found {difference}")


def seconds(calls: list) -> float:
    """Of one call, the median of rounds of which each makes every call once."""
    import torch

    for _ in range(WARM):
        for call in calls:
            call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(ROUNDS + 1)]
    torch.cuda._sleep(QUEUE_CYCLES)
    marks[0].record()
    for mark in marks[1:]:
        for call in calls:
            call()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1e3 / len(calls)


def sdpa(shape: Shape, backend: str, device: str) -> "tuple[list, str]":
    """Calls, one for each copy of K and V, and what is to be said about them."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, **more):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, **more)

    streams, context = len(shape.contexts), shape.contexts[0]
    group = shape.heads // shape.kv_heads
    more, note = {"enable_gqa": True} if group > 1 else {}, ""
    q = random(device, streams, shape.heads, 1, shape.size)
    copies = [[random(device, streams, shape.kv_heads, context, shape.size) for _ in "kv"] for _ in range(shape.copies())]
    k, v = copies[0]
    expected = reference(q[-1, :, 0], k[-1].transpose(0, 1), v[-1].transpose(0, 1))
    try:
        found = attend(q, k, v, **more)
    except RuntimeError:
        if group == 1:
            raise
        more, note = {}, f"K and V repeated {group} times beforehand"
        copies = [[side.repeat_interleave(group, dim=1) for side in copy] for copy in copies]
        found = attend(q, *copies[0])
    compare(found[-1, :, 0], expected)
    return [lambda k=k, v=v: attend(q, k, v, **more) for k, v in copies], note


def flashinfer(shape: Shape, tensor_cores: bool, device: str) -> "tuple[list, str]":
    """As sdpa, by FlashInfer."""
    import flashinfer as library
    import torch

    pages = [math.ceil(context / PAGE) for context in shape.contexts]
    begins = torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    order = torch.randperm(sum(pages), dtype=torch.int32)
    last = torch.tensor([(context - 1) % PAGE + 1 for context in shape.contexts], dtype=torch.int32)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(begins.to(device), order.to(device), last.to(device), shape.heads, shape.kv_heads, shape.size, PAGE,
                 q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)
    q = random(device, len(pages), shape.heads, shape.size)
    copies = [tuple(random(device, sum(pages), PAGE, shape.kv_heads, shape.size) for _ in "kv") for _ in range(shape.copies())]
    of_last = order[-pages[-1]:].long().to(device)
    k, v = (side[of_last].flatten(0, 1)[:shape.contexts[-1]] for side in copies[0])
    compare(wrapper.run(q, copies[0])[-1], reference(q[-1], k, v))
    return [lambda copy=copy: wrapper.run(q, copy) for copy in copies], f"version {library.__version__}"


def one_peer(options) -> None:
    """Measures one peer of one batch and prints it as JSON."""
    import torch

    torch.manual_seed(1)
    torch.cuda.set_device(options.device)
    shape = Shape.of(roofline.Model.read(options.model), options.batch[0])
    name = options.peer
    calls, note = (sdpa(shape, SDPA[name], options.device) if name in SDPA else
                   flashinfer(shape, FLASHINFER[name], options.device))
    with torch.no_grad():
        print(json.dumps({"seconds": seconds(calls), "note": note, "torch": torch.__version__}))


def peers(options, batch: str, deadline: float) -> "list[dict]":
    rows = []
    uniform = len(set(contexts(batch))) == 1
    for name in [*(SDPA if uniform else []), *FLASHINFER]:
        command = [sys.executable, __file__, "--model", str(options.model), "--device", options.device, "--batch", batch,
                   "--peer", name]
        found = guarded.measure(command, min(deadline, time.monotonic() + PEER_S_MAX))
        rows.append({"batch": batch, "who": name, **found})
    return rows


def kvern(options, layers: int) -> "list[dict]":
    """A token of each stream passes the attention of all layers: a layer takes streams / rate / layers."""
    command = [str(options.kvern), "bench", str(options.model), "--device", options.device, "--load-format", "dummy",
               "--json", "--rounds", str(options.rounds), "--steps", str(STEPS), "--max-num-batched-tokens", "8192"]
    command += [flag for batch in options.batch for flag in ("--attention", batch)]
    done = subprocess.run([*command, *options.flag], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"kvern bench ended with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    rates = {line["workload"]: line["median"] for line in lines}
    missing = [batch for batch in options.batch if f"attention {batch}" not in rates]
    if missing:
        sys.exit(f"expected attention of {', '.join(options.batch)} in the output of kvern bench, found none of {', '.join(missing)}")
    return [{"batch": batch, "who": "kvern", "seconds": len(contexts(batch)) / rates[f"attention {batch}"] / layers, "note": ""}
            for batch in options.batch]


def report(model: roofline.Model, rows: "list[dict]", read: float) -> "list[str]":
    """Prints the table; the aims that were missed."""
    print(f"{'batch':18} {'who':24} {'us/layer':>9} {'TB/s':>6} {'of reads':>9} {'kvern is':>9}")
    missed = []
    for row in rows:
        if row["who"] == "kvern":
            own = row["seconds"]
        if "not_measured" in row:
            print(f"{row['batch']:18} {row['who']:24} not measured: {row['not_measured']}")
            continue
        shape = Shape.of(model, row["batch"])
        rate = shape.bytes() / row["seconds"]
        times = f"{row['seconds'] / own:8.2f}x" if row["who"] != "kvern" else f"{'-':>9}"
        print(f"{row['batch']:18} {row['who']:24} {row['seconds'] * 1e6:9.1f} {rate / 1e12:6.2f} {rate / read:9.1%} {times}  "
              f"{row['note']}".rstrip())
        aim = AIM_UNIFORM if shape.uniform else AIM_SKEWED
        if row["who"] == "kvern" and rate < aim * read:
            missed.append(f"{row['batch']}: expected {aim:.0%} of the rate of reads, found {rate / read:.1%}")
    return missed


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="device of the bench, and of the peers")
    parser.add_argument("--batch", action="append", type=checked,
                        help=f"STREAMSxCONTEXT, of several contexts joined by + [default: {' '.join(BATCHES)}]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the bench")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of kvern bench")
    parser.add_argument("--peer", choices=[*SDPA, *FLASHINFER], help="measure this one alone and print it as JSON")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    options.batch = options.batch or BATCHES
    if not (options.kvern or options.peer):
        parser.error("--kvern or --peer is needed")
    return options


def main() -> None:
    options = arguments()
    if options.peer:
        one_peer(options)
        return
    model = roofline.Model.read(options.model)
    before = roofline.measured_limits()
    ours = kvern(options, model.layers)
    deadline = time.monotonic() + PEERS_S_MAX
    rows = [row for own in ours for row in (own, *peers(options, own["batch"], deadline))]
    after = roofline.measured_limits()
    read = max(max(side["read"].values()) for side in (before, after))
    if options.out:
        options.out.write_text(json.dumps({"before": before, "after": after, "rows": rows}, indent=1))
    print(f"attention of {options.model.name} on {before['gpu']}; reads by torch {read / 1e12:.2f} TB/s")
    missed = report(model, rows, read)
    if missed:
        sys.exit("\n".join(missed))


if __name__ == "__main__":
    main()
