#!/usr/bin/env python3
"""Makes a folder that a server can start from: the shape of a model, the tokenizer of another, random weights if asked.

As the tokenizer has fewer tokens than the shape's own, the folder's vocabulary is the tokenizer's. Weights are as
transformers initializes them, in bf16, never zeros: zeros are cheaper to multiply.
"""

import argparse
import json
import pathlib
import shutil

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Any of these in generation_config.json would make a request that asks for nothing a sampled one.
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SHARD = "4GB"


def folder(shape: pathlib.Path, weights: pathlib.Path, to: pathlib.Path) -> int:
    """Fills `to` with config.json of `shape` and the tokenizer of `weights`; the size of its vocabulary."""
    config = json.loads((shape / "config.json").read_text())
    other = read(weights / "config.json")
    size = max(tokens(weights / "tokenizer.json"), other.get("vocab_size", 0))
    config["vocab_size"] = size
    # The shape's own end no longer is a token.
    for name in ("bos_token_id", "eos_token_id"):
        config.pop(name, None)
        if isinstance(other.get(name), int):
            config[name] = other[name]
    (to / "config.json").write_text(json.dumps(config, indent=1))
    for name in TOKENIZER_FILES:
        if (weights / name).is_file():
            shutil.copy2(weights / name, to)
    generation = read(weights / "generation_config.json")
    if generation and not any(name in generation for name in SAMPLING):
        shutil.copy2(weights / "generation_config.json", to)
    return size


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}


def tokens(tokenizer: pathlib.Path) -> int:
    """One more than the largest id of a tokenizer.json."""
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    # A dictionary from token to id or, of unigram models, a list.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return 1 + max(ids + [token["id"] for token in content.get("added_tokens", [])])


def model(at: pathlib.Path, device: str, attention: "str | None" = None):
    """The model of `at`/config.json by transformers, with random weights in bf16 on `device`."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(at)
    chosen = {"attn_implementation": attention} if attention else {}
    with torch.device(device):
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **chosen)
    made = made.to(device).eval().requires_grad_(False)
    found = {(parameter.dtype, parameter.device.type) for parameter in made.parameters()}
    if found != {(torch.bfloat16, torch.device(device).type)}:
        raise RuntimeError(f"expected weights in bf16 on {device}, found {found}")
    flat = [name for name, parameter in made.named_parameters() if parameter.dim() > 1 and parameter.std() == 0]
    if flat:
        raise RuntimeError(f"expected random weights, found only equal ones in {flat[:4]}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes random weights of the folder's config.json into it.")
    parser.add_argument("folder", type=pathlib.Path, help="folder with config.json")
    parser.add_argument("--device", default="cuda:0", help="where the weights are made")
    options = parser.parse_args()
    config = (options.folder / "config.json").read_bytes()
    model(options.folder, options.device).save_pretrained(options.folder, max_shard_size=SHARD)
    # What transformers adds to these is of no use to the server; a default of sampling would be in the way.
    (options.folder / "config.json").write_bytes(config)
    (options.folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
