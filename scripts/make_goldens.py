"""Makes models/tests/golden: tiny random checkpoints and the logits that transformers computes with them.

Run from the repository root: `python scripts/make_goldens.py` (packages: scripts/requirements-goldens.txt). The output
depends on nothing but this file and the pinned packages; it is committed, so that the tests need neither.

    golden/sequences.json          token ids; the second sequence begins with the first one's PREFIX tokens
    golden/checkpoints/*.safetensors, *.gguf    weights; a case names its checkpoint in case.json
    golden/<case>/config.json      as a published repository writes it
    golden/<case>/case.json        {"checkpoint", "context_max"}
    golden/<case>/logits.safetensors    [rows, vocab] F32 per sequence: "0" from its start, "1" from row PREFIX on

Weights are scaled so that attention is far from uniform and logits have a deviation near 1; with transformers' own
initialization (deviation 0.02) a wrong model would pass a tolerance of 1e-4.

Transformers changes the frequencies of `dynamic` and `longrope` with the length of the current call; a server with a
shared cache fixes them at load for its longest context. Both agree for one call over exactly `context_max` tokens, and
because attention is causal its rows are also right for every prefix. So each case is one call per sequence, and all
sequences of a case are `context_max` long.
"""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = Path("models/tests/golden")
VOCAB, HIDDEN, FFN, LAYERS = 128, 64, 96, 2
LENGTH, PREFIX, ORIGINAL = 72, 40, 48  # ORIGINAL: context before RoPE scaling
SHORT = 44  # below ORIGINAL: longrope's short factors

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE, "rope_theta": 10000.0}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **BASE, "rope_theta": 1000000.0}
SCALED = {"max_position_embeddings": 2 * ORIGINAL}
HALF = 16 // 2  # frequencies per head of llama
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(HALF)],
    "long_factor": [1.0 + 0.7 * i for i in range(HALF)],
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}

# Checkpoint: (config, seed, dtype in the file).
CHECKPOINTS = {
    "llama": (LLAMA, 1, torch.float32),
    "llama-tied": (LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 4}, 2, torch.bfloat16),
    "llama-bias": (LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}, 3, torch.float16),
    "mistral": (
        LLAMA
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "head_dim": 24,
            "sliding_window": 20,
        },
        4,
        torch.bfloat16,
    ),
    "qwen2": (QWEN2, 5, torch.bfloat16),
    "qwen3": (
        QWEN2
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 32,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
        },
        6,
        torch.bfloat16,
    ),
}

# Case: (checkpoint, changes to its config, context_max). The rope cases of llama share one checkpoint. Old files say
# `rope_scaling` with `rope_theta` beside it, new ones `rope_parameters`; `type` is the oldest name of `rope_type`.
CASES = {
    "llama": ("llama", {}, LENGTH),
    "llama-linear": ("llama", SCALED | {"rope_scaling": {"type": "linear", "factor": 4.0}}, LENGTH),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": ORIGINAL, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        LENGTH,
    ),
    "llama-llama3": (
        "llama",
        SCALED
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL,
            }
        },
        LENGTH,
    ),
    "llama-yarn": ("llama", SCALED | {"rope_parameters": YARN | {"rope_theta": 10000.0}}, LENGTH),
    "llama-yarn-mscale": (
        "llama",
        SCALED | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}},
        LENGTH,
    ),
    "llama-longrope": ("llama", SCALED | {"rope_parameters": LONGROPE | {"rope_theta": 10000.0}}, LENGTH),
    "llama-longrope-short": ("llama", SCALED | {"rope_scaling": LONGROPE | {"factor": 4.0}}, SHORT),
    "llama-tied": ("llama-tied", {}, LENGTH),
    "llama-bias": ("llama-bias", {}, LENGTH),
    "mistral": ("mistral", {}, LENGTH),
    "mistral-full": ("mistral", {"sliding_window": None}, LENGTH),
    "qwen2": ("qwen2", {}, LENGTH),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
        LENGTH,
    ),
    "qwen3": ("qwen3", {}, LENGTH),
}


def model_of(config: dict) -> torch.nn.Module:
    kind = dict(config)
    parsed = AutoConfig.for_model(kind.pop("model_type"), **kind)
    return AutoModelForCausalLM.from_config(parsed, attn_implementation="eager").eval()


def random_state(model: torch.nn.Module, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Seeded weights, rounded to `dtype`, that keep activations near deviation 1 and sharpen attention."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    tied = model.config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 1.0 + 0.3 * noise if "norm" in name else 0.5 * noise
        elif "embed_tokens" in name:
            value = noise * (HIDDEN**-0.5 if tied else 1.0)
        else:
            gain = 1.7 if "q_proj" in name or "k_proj" in name else 1.0
            value = noise * gain * parameter.shape[1] ** -0.5
        state[name] = value.to(dtype).contiguous()
    return state


def logits_of(config: dict, state: dict[str, torch.Tensor], sequences: list[list[int]]) -> list[torch.Tensor]:
    model = model_of(config)
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected and missing in ([], ["lm_head.weight"]), (missing, unexpected)
    model.tie_weights()
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].float().contiguous() for ids in sequences]


GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in GGUF_NAMES:
        return GGUF_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{GGUF_LAYER_NAMES[stem]}.{kind}"


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """The order in which llama's GGUF files hold the rows of q and k: each head's two halves, interleaved."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    arch = config["model_type"]
    head_dim = config.get("head_dim", HIDDEN // config["num_attention_heads"])
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_vocab_size(VOCAB)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if arch == "llama" and "q_proj" in name:
            values = interleave(values, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            values = interleave(values, config["num_key_value_heads"])
        if tensor.dtype == torch.bfloat16 and values.ndim == 2:
            bits = gguf.quants.quantize(values, gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(gguf_name(name), bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    (GOLDEN / "checkpoints").mkdir(parents=True)

    rng = np.random.default_rng(7)
    first = rng.integers(0, VOCAB, LENGTH).tolist()
    second = first[:PREFIX] + rng.integers(0, VOCAB, LENGTH - PREFIX).tolist()
    sequences = [first, second]
    (GOLDEN / "sequences.json").write_text(json.dumps(sequences) + "\n")

    for name, (config, seed, dtype) in CHECKPOINTS.items():
        state = random_state(model_of(config), seed, dtype)
        save_file(state, GOLDEN / "checkpoints" / f"{name}.safetensors", metadata={"format": "pt"})
        if name in ("llama", "qwen2", "qwen3"):
            write_gguf(GOLDEN / "checkpoints" / f"{name}.gguf", config, state)

    seen: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, (checkpoint, changes, context_max) in CASES.items():
        config = CHECKPOINTS[checkpoint][0] | changes
        if "rope_parameters" in config:
            config.pop("rope_theta")
        state = load_file(GOLDEN / "checkpoints" / f"{checkpoint}.safetensors")
        logits = logits_of(config, state, [ids[:context_max] for ids in sequences])
        # The cases tell rope kinds and windows apart, else matching them would show little.
        for other, theirs in seen.setdefault(checkpoint, []):
            rows = min(len(theirs), context_max)
            gap = (theirs[:rows] - logits[0][:rows]).abs().max().item()
            assert gap > 0.05, f"{name} and {other} differ by {gap} alone"
        seen[checkpoint].append((name, logits[0]))
        folder = GOLDEN / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "case.json").write_text(
            json.dumps({"checkpoint": checkpoint, "context_max": context_max}) + "\n"
        )
        save_file({"0": logits[0], "1": logits[1][PREFIX:].clone()}, folder / "logits.safetensors")
        print(f"{name}: logits deviate by {logits[0].std():.2f}, largest {logits[0].abs().max():.1f}")


if __name__ == "__main__":
    main()
