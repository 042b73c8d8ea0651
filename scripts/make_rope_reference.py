"""Makes models/tests/rope_reference.json: RoPE frequencies of every scaling, computed by transformers.

Run from the repository root: `python scripts/make_rope_reference.py` (packages: torch 2, transformers 5.23.0). The output
is committed, so that the tests need neither.

Each case holds the keys of a config.json, the longest context of the server, and what transformers computes for it:
`inv_freq` in radians per position and `scale`, the factor of cos and sin.
"""

import json
from pathlib import Path

from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

BASE = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 4096, "rope_theta": 10000.0}
HALF = 32
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.01 * i for i in range(HALF)],
    "long_factor": [1.0 + 0.37 * i for i in range(HALF)],
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}

CASES = {
    "default": ({}, 4096),
    "default, theta 500000": ({"rope_theta": 500000.0}, 4096),
    "default, partial": ({"partial_rotary_factor": 0.5}, 4096),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 4096),
    "dynamic within the context": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1000),
    "dynamic beyond the context": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 9000),
    "llama3": (
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        131072,
    ),
    "yarn": ({"rope_scaling": YARN}, 4096),
    "yarn, factor from the contexts": ({"rope_scaling": {**YARN, "factor": None}}, 4096),
    "yarn, attention_factor": ({"rope_scaling": {**YARN, "attention_factor": 1.25}}, 4096),
    "yarn, mscale": ({"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}, 4096),
    "yarn, betas, not truncated": (
        {"rope_scaling": {**YARN, "factor": 16.0, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False}},
        4096,
    ),
    "yarn, theta 1000000": ({"rope_theta": 1000000.0, "rope_scaling": {**YARN, "factor": 32.0}}, 4096),
    "longrope, short": ({"rope_scaling": LONGROPE}, 1024),
    "longrope, long": ({"rope_scaling": LONGROPE}, 1025),
    "longrope, factor": ({"rope_scaling": {**LONGROPE, "factor": 16.0}}, 4096),
    "rope_parameters": (
        {"rope_theta": None, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 20000.0}},
        4096,
    ),
}


def reference(keys, context):
    config = LlamaConfig(**keys)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        partial = config.rope_parameters.get("partial_rotary_factor", 1.0)
        if len(inv_freq) != int(64 * partial) // 2:
            # Llama's own default ignores the partial factor, which other families apply to the same formula.
            narrow = LlamaConfig(**{**keys, "head_dim": int(64 * partial), "partial_rotary_factor": None})
            inv_freq, scale = LlamaRotaryEmbedding.compute_default_rope_parameters(narrow)
    else:
        inv_freq, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=context)
    return [float(f) for f in inv_freq], float(scale)


def main():
    cases = []
    for name, (extra, context) in CASES.items():
        keys = {key: value for key, value in {**BASE, **extra}.items() if value is not None}
        inv_freq, scale = reference(json.loads(json.dumps(keys)), context)
        cases.append({"name": name, "config": keys, "context_max": context, "inv_freq": inv_freq, "scale": scale})
    lines = ",\n".join(json.dumps(case) for case in cases)
    Path("models/tests/rope_reference.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
