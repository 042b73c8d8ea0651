#!/usr/bin/env python3
"""Continuous batching by transformers: prompts of random tokens to answers of a fixed length; times of tokens as JSON.

Weights are random, of a folder's config.json. The clock runs from the first request on: building the model and
capturing graphs do not count. The output's last line is the JSON.
"""

import argparse
import json
import pathlib
import time

import transformers

import load
import made

WARM_TOKENS = 4


def generate(model, prompts: "list[list[int]]", tokens: int) -> "list[load.Stream]":
    # Greedy; an end that is no token never comes.
    wanted = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    began = time.perf_counter()
    answers = model.generate_batch(inputs=prompts, generation_config=wanted, record_timestamps=True)
    streams = [load.Stream(max(began, answer.created_time), list(answer.timestamps or [])[:tokens],
                           len(answer.generated_tokens), answer.error) for answer in answers.values()]
    # What generate_batch leaves out has failed without a word.
    streams += [load.Stream(began, [], 0, "no answer")] * (len(prompts) - len(streams))
    return streams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="torch's device")
    parser.add_argument("--attention", help="implementation of attention [default: that of continuous batching]")
    parser.add_argument("--streams", type=int, required=True, help="requests, all at once")
    parser.add_argument("--in", dest="tokens_in", type=int, required=True, help="tokens of a prompt")
    parser.add_argument("--out-tokens", dest="tokens_out", type=int, required=True, help="tokens of an answer")
    options = parser.parse_args()
    used = []
    model = made.model(options.folder, options.device, options.attention)
    switch = model.set_attn_implementation
    # Continuous batching chooses by itself, and sets it back at the end: what it used is known only while it runs.
    model.set_attn_implementation = lambda name, *rest, **more: (used.append(name), switch(name, *rest, **more))[1]
    draw = load.Prompts(model.config.vocab_size, options.tokens_in)
    generate(model, draw.take(2), WARM_TOKENS)
    streams = generate(model, draw.take(options.streams), options.tokens_out)
    attention = next((name for name in used if "paged" in name), options.attention or model.config._attn_implementation)
    print(json.dumps({"attention": attention, "version": transformers.__version__,
                      **load.figures(streams, options.tokens_out)}))


if __name__ == "__main__":
    main()
