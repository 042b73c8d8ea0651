#!/usr/bin/env python3
"""Attention of prompts, one layer of a model's shape: `kvern bench --attention TOKENS` beside torch's and FlashInfer's.

One sequence from its first token, every query seeing what is before it (causal), in bf16. Kvern reads K and V in scattered
blocks and is measured with each of its kernels that is named by --prefill-kernel; its peers read them in one piece. Each
peer runs in a process of its own and is compared with softmax in f32 before it is timed; one that is not there, or fails,
is a row with the reason. Operations are those of the two products of the half of the matrix that is seen; the share is of
the rate of bf16 products that torch reaches before and after in the same run.

There is no aim for attention alone: that for whole prompts is roofline.py's. Fails where no peer could be measured.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import attention
import guarded
import roofline

PROMPTS = [2048, 8192]
FLASHINFER = "flashinfer"
PEERS = [*attention.SDPA, FLASHINFER]
PEER_S_MAX, PEERS_S_MAX = 120, 480
STEPS = 8


def operations(model: roofline.Model, tokens: int) -> float:
    """Of one layer: two products, of each query with what it sees."""
    return 4 * model.q * tokens * (tokens + 1) / 2


def check(q, k, v, found) -> None:
    """Compares outputs [tokens, heads, size] of two queries, the last and one that may not see everything."""
    for at in (q.shape[0] - 1, q.shape[0] // 2):
        attention.compare(found[at], attention.reference(q[at], k[:at + 1], v[:at + 1]))


def sdpa(shape: attention.Shape, backend: str, device: str):
    """A call, and what is to be said about it."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens, group = shape.contexts[0], shape.heads // shape.kv_heads
    q = attention.random(device, 1, shape.heads, tokens, shape.size)
    k, v = (attention.random(device, 1, shape.kv_heads, tokens, shape.size) for _ in "kv")
    seen = [side[0].transpose(0, 1) for side in (q, k, v)]

    def attend(k, v, **more):
        with sdpa_kernel([getattr(SDPBackend, backend)]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **more)

    more, note = {"enable_gqa": True} if group > 1 else {}, ""
    try:
        found = attend(k, v, **more)
    except RuntimeError:
        if group == 1:
            raise
        more, note = {}, f"K and V repeated {group} times beforehand"
        k, v = (side.repeat_interleave(group, dim=1) for side in (k, v))
        found = attend(k, v)
    check(*seen, found[0].transpose(0, 1))
    return lambda: attend(k, v, **more), note


def flashinfer(shape: attention.Shape, device: str):
    """As sdpa, by FlashInfer."""
    import flashinfer as library

    tokens = shape.contexts[0]
    q = attention.random(device, tokens, shape.heads, shape.size)
    k, v = (attention.random(device, tokens, shape.kv_heads, shape.size) for _ in "kv")

    def attend():
        return library.single_prefill_with_kv_cache(q, k, v, causal=True, kv_layout="NHD")

    check(q, k, v, attend())
    return attend, f"version {library.__version__}"


def one_peer(options) -> None:
    """Measures one peer of one prompt and prints it as JSON."""
    import torch

    torch.manual_seed(1)
    torch.cuda.set_device(options.device)
    shape = attention.Shape.of(roofline.Model.read(options.model), f"1x{options.prompt[0]}")
    with torch.no_grad():
        if options.peer == FLASHINFER:
            call, note = flashinfer(shape, options.device)
        else:
            call, note = sdpa(shape, attention.SDPA[options.peer], options.device)
        print(json.dumps({"seconds": attention.seconds([call]), "note": note, "torch": torch.__version__}))


def peers(options, prompt: int, deadline: float) -> "list[dict]":
    rows = []
    for name in PEERS:
        command = [sys.executable, __file__, "--model", str(options.model), "--device", options.device, "--prompt", str(prompt),
                   "--peer", name]
        rows.append({"prompt": prompt, "who": name, **guarded.measure(command, min(deadline, time.monotonic() + PEER_S_MAX))})
    return rows


def kvern(options, kernel: str, layers: int) -> "list[dict]":
    """All tokens of a prompt pass the attention of all layers: a layer takes tokens / rate / layers."""
    command = [str(options.kvern), "bench", str(options.model), "--device", options.device, "--load-format", "dummy", "--json",
               "--rounds", str(options.rounds), "--steps", str(STEPS), "--max-num-batched-tokens", "8192",
               "--prefill-attention", kernel]
    command += [flag for prompt in options.prompt for flag in ("--attention", str(prompt))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"kvern bench ended with {done.returncode}")
    return measured(done.stdout, options.prompt, kernel, layers)


def measured(output: str, prompts: "list[int]", kernel: str, layers: int) -> "list[dict]":
    """A row for each prompt of what kvern bench printed."""
    rates = {row["workload"]: row["median"] for row in map(json.loads, output.splitlines())}
    missing = [str(prompt) for prompt in prompts if f"attention {prompt}" not in rates]
    if missing:
        sys.exit(f"expected attention of prompts of {', '.join(missing)} tokens in the output of kvern bench, found {', '.join(rates)}")
    return [{"prompt": prompt, "who": f"kvern {kernel}", "seconds": prompt / rates[f"attention {prompt}"] / layers, "note": ""}
            for prompt in prompts]


def report(model: roofline.Model, rows: "list[dict]", product: float) -> "list[int]":
    """Prints the table; the prompts that have no peer."""
    print(f"{'prompt':>7} {'who':18} {'us/layer':>9} {'TFLOP/s':>8} {'of products':>11}  {'the fastest peer takes':>22}")
    fastest = {}
    for row in rows:
        if "seconds" in row and not row["who"].startswith("kvern "):
            fastest[row["prompt"]] = min(row["seconds"], fastest.get(row["prompt"], row["seconds"]))
    for row in rows:
        if "not_measured" in row:
            print(f"{row['prompt']:7} {row['who']:18} not measured: {row['not_measured']}")
            continue
        rate = operations(model, row["prompt"]) / row["seconds"]
        beside = f"{fastest[row['prompt']] / row['seconds']:21.2f}x" if row["prompt"] in fastest else f"{'-':>22}"
        print(f"{row['prompt']:7} {row['who']:18} {row['seconds'] * 1e6:9.1f} {rate / 1e12:8.1f} {rate / product:11.1%}  {beside}  "
              f"{row['note']}".rstrip())
    return sorted({row["prompt"] for row in rows} - fastest.keys())


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="device of the bench, and of the peers")
    parser.add_argument("--prompt", action="append", type=int, help=f"tokens [default: {' '.join(map(str, PROMPTS))}]")
    parser.add_argument("--prefill-kernel", action="append", choices=["portable", "hopper"],
                        help="Kvern's kernel; of several, each is measured [default: the server's choice]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the bench")
    parser.add_argument("--peer", choices=PEERS, help="measure this one alone and print it as JSON")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    options.prompt = options.prompt or PROMPTS
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
    ours = [row for kernel in options.prefill_kernel or ["auto"] for row in kvern(options, kernel, model.layers)]
    deadline = time.monotonic() + PEERS_S_MAX
    rows = [row for prompt in options.prompt
            for row in (*(own for own in ours if own["prompt"] == prompt), *peers(options, prompt, deadline))]
    after = roofline.measured_limits()
    product = max(max(side["product"].values()) for side in (before, after))
    if options.out:
        options.out.write_text(json.dumps({"before": before, "after": after, "rows": rows}, indent=1))
    print(f"attention of prompts, {options.model.name} on {before['gpu']}; products by torch {product / 1e12:.0f} TFLOP/s")
    alone = report(model, rows, product)
    if alone:
        sys.exit(f"expected a peer for prompts of {', '.join(map(str, alone))} tokens, found none that could be measured")


if __name__ == "__main__":
    main()
