"""Makes models/tests/oracle/reference.json: prompts and the tokens that llama.cpp continues them with, greedily, in F32.

Run from the repository root after `make model`: `python scripts/make_llamacpp_reference.py` (packages:
scripts/requirements-llamacpp.txt; xllamacpp holds a prebuilt llama.cpp). The default model file is dequantized to an
F32 GGUF in a temporary folder, by the `gguf` package, and llama.cpp runs that with an F32 cache and without flash
attention, one prompt at a time. Token ids of the prompts are llama.cpp's too.

Per prompt: `kind`, `text`, `prompt` (ids), `tokens` (greedy continuation; shorter than NEW when the model ends the text,
whose end token is then included), `gap` (least difference of the two best log-probabilities over the continuation).

Rule for near-ties: two right F32 implementations sum in different orders and differ by about 1e-4 in a logit of this
model, so a continuation whose gap is below GAP_MIN proves nothing beyond that token. Such a prompt stays in the list and
its tokens are cut before the near-tie; the script prints each cut, and fails if fewer than KEPT_MIN tokens are left.
"""

import json
import math
import sys
import tempfile
import urllib.request
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType, GGUFValueType

MODEL = Path("models-cache/SmolLM2-135M-Instruct.Q4_1.gguf")
OUT = Path("models/tests/oracle/reference.json")
NEW = 32
GAP_MIN = 2e-3
KEPT_MIN = 16


def chat(*turns: tuple[str, str]) -> str:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    body = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return system + body + "<|im_start|>assistant\n"


LONG_PROSE = """The lighthouse stood at the far end of the harbour wall, and every evening the keeper climbed its
ninety-one steps with a can of oil in one hand and a notebook in the other. He wrote down what he saw: the direction of
the wind, the colour of the sky, the names of the boats that came home and of those that did not. In the winter of the
great storm he wrote for eleven days without stopping, because nobody came to relieve him and because, he said later, the
light was the only thing on that coast that still knew where it was. When the sea had calmed the villagers found the
notebook open on the table. The last page said that a ship without sails and without smoke had passed the point at four in
the morning, close enough to read the letters on her stern, and that the letters had been in an alphabet he did not know.
The mayor had the page copied and sent to the university in the capital. A professor answered after three months. The
letters, she wrote, were an old form of the script that fishermen of this same village had used four hundred years ago,
before the harbour wall was built, and they spelled a single word. The mayor read the letter aloud in the church. When he
came to the word he stopped, folded the paper, and put it into his pocket. Only the keeper asked him what it was, and the
mayor"""

LONG_CODE = '''use std::collections::HashMap;

/// Counts how often each word occurs in a text, ignoring case.
pub fn word_counts(text: &str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for word in text.split(|c: char| !c.is_alphanumeric()) {
        if word.is_empty() {
            continue;
        }
        *counts.entry(word.to_lowercase()).or_insert(0) += 1;
    }
    counts
}

/// The `n` most frequent words, the most frequent first; ties in alphabetical order.
pub fn most_frequent(text: &str, n: usize) -> Vec<(String, usize)> {
    let mut words: Vec<_> = word_counts(text).into_iter().collect();
    words.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    words.truncate(n);
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_words_of_any_case() {
'''

PROMPTS = [
    ("short", "The capital of France is"),
    ("short", "Once upon a time"),
    ("short", "Water boils at"),
    ("short", "1, 2, 3, 4, 5,"),
    ("short", "Hello"),
    ("short", "To be, or not to be, that is"),
    ("list", "The planets of the solar system, from the Sun outwards:\n1. Mercury\n2."),
    ("fact", "Photosynthesis is the process by which plants"),
    ("fact", "The theory of general relativity, published in 1915 by"),
    ("dialogue", '"Where have you been?" she asked, without looking up from her book.\n\n"'),
    ("code", "def fibonacci(n):\n    "),
    ("code", "SELECT name, COUNT(*) FROM orders\nGROUP BY"),
    ("code", "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++) {\n"),
    ("code", "<!DOCTYPE html>\n<html>\n<head>\n  <title>"),
    ("code", LONG_CODE),
    ("math", "Question: A train travels 60 miles in 1.5 hours. What is its average speed?\nAnswer:"),
    ("math", "If x + 3 = 10, then x ="),
    ("french", "La révolution française a commencé en"),
    ("german", "Die Hauptstadt von Deutschland ist"),
    ("spanish", "Había una vez, en un pueblo muy lejano,"),
    ("chinese", "中国的首都是"),
    ("russian", "Москва — столица"),
    ("symbols", "🎉🎉🎉 Happy birthday! 🎂"),
    ("long", LONG_PROSE),
    ("long", LONG_PROSE.replace("\n", " ")[:900]),
    ("chat", chat(("user", "What is gravity?"))),
    ("chat", chat(("user", "Write a haiku about the sea."))),
    ("chat", chat(("user", "Hi!"), ("assistant", "Hello! How can I help you today?"), ("user", "Name three colours."))),
    ("chat", chat(("user", "Write a Python function that reverses a string."))),
    ("chat", chat(("user", "Summarize in one sentence:\n" + LONG_PROSE))),
]


def dequantize(source: Path, target: Path) -> None:
    """Copies a GGUF with every tensor widened to F32 and all metadata kept."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_kind = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_kind)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path) -> xllamacpp.Server:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = 2048
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def continuation(server: xllamacpp.Server, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the difference of the two best log-probabilities of each one that llama.cpp reports.

    It reports none for a token that ends inside a character; a near-tie there would show as a failure of the test.
    """
    answer = post(
        server,
        "/completion",
        {"prompt": prompt, "n_predict": NEW, "temperature": 0.0, "n_probs": 2, "return_tokens": True,
         "cache_prompt": False, "samplers": ["temperature"], "repeat_penalty": 1.0},
    )
    tokens = answer["tokens"]
    gaps = [math.inf] * len(tokens)
    at = 0
    for step in answer["completion_probabilities"]:
        best, second = step["top_logprobs"]
        assert step["id"] == best["id"], "not greedy"
        at = tokens.index(step["id"], at)
        gaps[at] = best["logprob"] - second["logprob"]
        at += 1
    return tokens, gaps


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "f32.gguf"
        dequantize(MODEL, model)
        server = serve(model)
        entries = []
        for kind, text in PROMPTS:
            body = {"content": text, "add_special": False, "parse_special": True}
            prompt = post(server, "/tokenize", body)["tokens"]
            tokens, gaps = continuation(server, prompt)
            near = next((i for i, gap in enumerate(gaps) if gap < GAP_MIN), None)
            if near is not None:
                print(f"near-tie of {gaps[near]:.1e} at token {near} of {kind} prompt {text[:40]!r}: cut there")
                tokens, gaps = tokens[:near], gaps[:near]
                if near < KEPT_MIN:
                    sys.exit("too few tokens left; replace that prompt")
            gap = round(min(gaps), 5)
            print(f"{kind}: {len(prompt)} prompt ids, {len(tokens)} new, least gap {gap}")
            entries.append({"kind": kind, "text": text, "prompt": prompt, "tokens": tokens, "gap": gap})
    OUT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    OUT.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
