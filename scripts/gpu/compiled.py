#!/usr/bin/env python3
"""Decoding by `kvern bench` beside a loop of PyTorch: a model of transformers with a static cache, compiled.

Both have random weights and K and V of the same shape, in bf16, and take the likeliest token. A step of the loop is
compiled by torch, captured in a CUDA graph with what it does between steps, and replayed, so that no step waits for
Python. Each loop runs in a process of its own; compiling and capturing are not timed. Two kinds of attention:

    masked    as transformers does it with a static cache: torch's attention under a mask of what is written
    whole     torch's attention of all places of the cache, without a mask: not more than the steps past the context

The ratio is to the faster of those that could be measured. Fails where a batch has none.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys
import time

import guarded
import made
import roofline

BATCHES = ["1x1024", "32x4096"]
# The first could be enough: the other is measured in what time is left.
ATTENTIONS = ("whole", "masked")
MODE = "max-autotune-no-cudagraphs"
# As kvern bench makes them: the context grows from the batch's by so many tokens.
STEPS = roofline.STEPS
ROUNDS, WARM = 10, 3
PEER_S_MAX, PEERS_S_MAX = 360, 640


def streams_context(batch: str) -> "tuple[int, int]":
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", batch)
    if not found:
        raise argparse.ArgumentTypeError(f"expected STREAMSxCONTEXT, found {batch!r}")
    return int(found[1]), int(found[2])


def checked(batch: str) -> str:
    streams_context(batch)
    return batch


class Loop:
    """A model, its full cache, and the tokens that go around."""

    def __init__(self, folder: pathlib.Path, device: str, batch: str, attention: str):
        import torch
        import transformers
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        # A name that is not known to have a mask gets none.
        transformers.AttentionInterface.register("whole", sdpa_attention_forward)
        streams, self.context = streams_context(batch)
        self.model = made.model(folder, device, {"masked": "sdpa"}.get(attention, attention))
        config = self.model.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = transformers.StaticCache(config=config, max_cache_len=self.context + STEPS)
        self.cache.early_initialization(streams, config.num_key_value_heads, size, torch.bfloat16, torch.device(device))
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.tokens = torch.randint(config.vocab_size, (streams, 1), device=device)

    def rewind(self) -> None:
        """To the batch's context; in place, as a graph knows the counts by their addresses."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def next(self, tokens):
        """The likeliest tokens after these, [streams, 1]; the cache is one longer."""
        logits = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True).logits
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    def compiled(self, mode: str):
        """A step: compiled, warmed up and captured."""
        import torch

        follow = torch.compile(self.next, mode=mode)

        def step() -> None:
            self.tokens.copy_(follow(self.tokens))

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.rewind()
            for _ in range(WARM):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def seconds(self, step) -> float:
        """Of one step, the median of rounds; the first does not count."""
        import torch

        found = []
        for _ in range(ROUNDS + 1):
            self.rewind()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(STEPS):
                step()
            ended.record()
            torch.cuda.synchronize()
            found.append(began.elapsed_time(ended) / 1e3 / STEPS)
        self.check()
        return statistics.median(found[1:])

    def check(self) -> None:
        lengths = {int(layer.cumulative_length) for layer in self.cache.layers}
        if lengths != {self.context + STEPS}:
            raise RuntimeError(f"expected {self.context + STEPS} tokens in each layer of the cache, found {sorted(lengths)}")


def one_loop(options) -> None:
    """Measures one batch with one kind of attention and prints it as JSON."""
    import torch
    import transformers

    torch.cuda.set_device(options.device)
    with torch.no_grad():
        loop = Loop(options.model, options.device, options.decode[0], options.attention)
        took = loop.seconds(loop.compiled(options.mode))
    print(json.dumps({"seconds": took, "torch": torch.__version__, "transformers": transformers.__version__}))


def loops(options) -> "list[dict]":
    deadline, rows = time.monotonic() + PEERS_S_MAX, []
    for attention in ATTENTIONS:
        for batch in options.decode:
            command = [sys.executable, __file__, "--model", str(options.model), "--device", options.device, "--decode", batch,
                       "--mode", options.mode, "--attention", attention]
            found = guarded.measure(command, min(deadline, time.monotonic() + PEER_S_MAX))
            rows.append({"batch": batch, "who": f"torch, {attention}", **found})
    return rows


def kvern(options) -> "list[dict]":
    rates = {row["workload"]: row["median"] for row in roofline.run_bench(options, options.decode, [], "auto")}
    missing = [batch for batch in options.decode if f"decode {batch}" not in rates]
    if missing:
        sys.exit(f"expected decoding of {', '.join(options.decode)} in the output of kvern bench, found none of {', '.join(missing)}")
    return [{"batch": batch, "who": "kvern", "seconds": streams_context(batch)[0] / rates[f"decode {batch}"]}
            for batch in options.decode]


def report(ours: "list[dict]", theirs: "list[dict]") -> "list[str]":
    """Prints the table; the batches of which no loop could be measured."""
    print(f"{'batch':10} {'who':16} {'ms/step':>9} {'kvern is':>9}")
    missed = []
    for own in ours:
        batch = own["batch"]
        print(f"{batch:10} {own['who']:16} {own['seconds'] * 1e3:9.3f} {'-':>9}")
        rows = [row for row in theirs if row["batch"] == batch]
        for row in rows:
            what = (f"not measured: {row['not_measured']}" if "not_measured" in row else
                    f"{row['seconds'] * 1e3:9.3f} {row['seconds'] / own['seconds']:8.2f}x")
            print(f"{batch:10} {row['who']:16} {what}")
        measured = [row for row in rows if "not_measured" not in row]
        if measured:
            best = min(measured, key=lambda row: row["seconds"])
            print(f"{batch:10} kvern is {best['seconds'] / own['seconds']:.2f} times as fast as the best loop "
                  f"({best['who']}; torch {best['torch']}, transformers {best['transformers']})")
        else:
            missed.append(batch)
    return missed


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvern", type=pathlib.Path, help="the binary")
    parser.add_argument("--model", type=pathlib.Path, required=True, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="device of the bench, and of the loops")
    parser.add_argument("--decode", action="append", type=checked, help=f"STREAMSxCONTEXT [default: {' '.join(BATCHES)}]")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the bench")
    parser.add_argument("--flag", action="append", default=[],
                        help="a further flag of kvern bench, as --flag=--load-format=dummy")
    parser.add_argument("--mode", default=MODE, help="torch.compile's; without graphs, as the loop has its own")
    parser.add_argument("--attention", choices=ATTENTIONS, help="measure this loop alone and print it as JSON")
    parser.add_argument("--out", type=pathlib.Path, help="file for all figures, as JSON")
    options = parser.parse_args()
    options.decode = options.decode or BATCHES
    if not (options.kvern or options.attention):
        parser.error("--kvern or --attention is needed")
    return options


def main() -> None:
    options = arguments()
    if options.attention:
        one_loop(options)
        return
    # One after the other: each has the GPU for itself.
    ours, theirs = kvern(options), loops(options)
    if options.out:
        options.out.write_text(json.dumps({"mode": options.mode, "rows": ours + theirs}, indent=1))
    print(f"decoding of {options.model.name}, {STEPS} steps from the context on")
    missed = report(ours, theirs)
    if missed:
        sys.exit(f"no compiled loop could be measured: {', '.join(missed)}")


if __name__ == "__main__":
    main()
