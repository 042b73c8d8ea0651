#!/usr/bin/env python3
"""Compares a GPU with the CPU: the same binary, model and prompts, greedy, in f32 and in bf16.

In f32 both compute the same up to the order of sums, so the texts must be equal, but where two tokens are as likely as
each other. In bf16 roundings differ, and what is compared is how likely each holds the tokens that both chose.
"""

import sys

import server

TOKENS = 48
TOP = 5
# Per type: at a token where the two part, how far apart it may be in likelihood from the other's choice; and how far
# apart the log-probabilities of a token that both chose may be, at most and on average.
LIMITS = {"f32": (2e-3, 2e-3, 2e-4), "bf16": (0.15, 0.3, 0.03)}


def answers(options, device: str, dtype: str) -> "list[dict]":
    flags = ["--device", device, "--dtype", dtype, *options.flag]
    log = options.logs / f"server-{device.replace(':', '')}-{dtype}.log"
    with server.running(options.kvern, options.model, flags, log) as running:
        return [running.complete(prompt, TOKENS, TOP)["logprobs"] for prompt in server.PROMPTS]


def compare(prompt: str, gpu: dict, cpu: dict, limits: tuple) -> "tuple[list[float], str | None]":
    """Differences of log-probabilities up to where the texts part, and what is wrong about the parting."""
    differences = []
    for at, (ours, theirs) in enumerate(zip(gpu["tokens"], cpu["tokens"])):
        if ours != theirs:
            gap = min(parted(gpu, at, ours, theirs), parted(cpu, at, theirs, ours))
            wrong = f"{prompt[:30]!r}: token {at} is {ours!r}, on the CPU {theirs!r}, {gap:.4f} apart"
            return differences, wrong if gap > limits[0] else None
        differences.append(abs(gpu["token_logprobs"][at] - cpu["token_logprobs"][at]))
    return differences, None


def parted(side: dict, at: int, own: str, other: str) -> float:
    """How much likelier a side holds its own token than the other's; infinitely, if that is not among the likeliest."""
    top = side["top_logprobs"][at]
    return top[own] - top.get(other, float("-inf"))


def main() -> None:
    options = server.arguments(__doc__.splitlines()[0]).parse_args()
    failed = False
    for dtype, limits in LIMITS.items():
        sides = (answers(options, options.device, dtype), answers(options, "cpu", dtype))
        found = [compare(prompt, *pair, limits) for prompt, *pair in zip(server.PROMPTS, *sides)]
        differences = [difference for each, _ in found for difference in each]
        wrong = [text for _, text in found if text]
        most, mean = max(differences, default=float("inf")), sum(differences) / max(1, len(differences))
        good = not wrong and most <= limits[1] and mean <= limits[2]
        print(f"{dtype}: {len(differences)} of {TOKENS * len(server.PROMPTS)} tokens before the first that differs; "
              f"log-probabilities differ by {most:.5f} at most (limit {limits[1]}), "
              f"{mean:.6f} on average ({limits[2]}): "
              f"{'pass' if good else 'FAIL'}")
        print("".join(f"  {text}\n" for text in wrong), end="")
        failed = failed or not good
    sys.exit(failed)


if __name__ == "__main__":
    main()
