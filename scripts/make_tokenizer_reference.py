"""Makes tests/data/tokenizer: texts, tiny tokenizers, and the ids that the reference implementations give.

    pip install tokenizers==0.23.3 gguf==0.19.0
    export LLAMA_LIB_DIR=...   # see llama_vocab.py
    python scripts/make_tokenizer_reference.py models-cache/SmolLM2-135M-Instruct.Q4_1.gguf

Files:
    corpus.json      the texts
    smollm2.json     llama.cpp's ids of each text with the default model's vocabulary, and its text where that differs
    gguf/<pre>.gguf  a tiny vocabulary for each kind of pre-tokenizer; gguf/ids.json: llama.cpp's ids of each text
    json/<kind>.json a tiny tokenizer.json for each kind of decoder; json/ids.json: ids and decoded texts of `tokenizers`

The tiny vocabularies are trained without any pre-tokenizer, so that merges run across every border that a pre-tokenizer
must cut; a missing cut shows in the ids.
"""

import json
import pathlib
import random
import sys

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama_vocab import Vocab

ROOT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "tokenizer"
PRE_TOKENIZERS = [
    "llama-bpe", "qwen2", "qwen35", "smollm", "gpt-2", "tekken", "gpt-4o", "deepseek-v3", "falcon", "default", "dbrx", "glm4",
]

WORDS = [
    "The quick brown fox jumps over the lazy dog.", "I'll we've they're he'd it's I'm don't CAN'T I'LL WE'VE THEY'RE",
    "HTTPServer parseJSON snake_case camelCase SCREAMING_CASE kebab-case x86_64 iPhone15Pro", "naïve café Ångström façade",
    "Straße GROẞ Œuvre Þórr Łódź Žižek İstanbul ıssız", "Привет, мир! Как дела? ЁЖИК ёжик", "Γειά σου Κόσμε ΑΒΓ αβγ ς",
    "你好，世界！今天天气很好。", "日本語のテキスト、カタカナとひらがな。東京タワー", "안녕하세요 세계 ㄱㄴㄷ 한국어", "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣٤٥", "שלום עולם נִקּוּד", "नमस्ते दुनिया हिन्दी १२३", "বাংলা ভাষা ৪৫৬", "தமிழ் மொழி", "မြန်မာဘာသာ", "ខ្មែរ",
    "ქართული ენა ႠႡႢ", "Հայերեն լեզու", "አማርኛ ቋንቋ", "ᏣᎳᎩ", "ᠮᠣᠩᠭᠣᠯ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒷𝑜𝓁𝒹 𝟙𝟚𝟛", "𐍈𐌰𐌽 𐤀𐤁 𒀀𒀁 𓀀𓀁", "ﬁ ﬂ ﬃ ŉ ǆ ǅ Ǆ",
    "👨‍👩‍👧‍👦 family 👩🏽‍💻 🏳️‍🌈 🇩🇪🇫🇷 ❤️ 👍🏿", "😀😃😄😁😆😅🤣😂", "☃★☂♠♣♥♦ ✓✔✗ → ⇒ ∀∃∅ ∑∏√∞ ≤≥≠", "①②③ Ⅳ ⅷ ½ ¼ ² ³ ⁴ ₅ ㊿ 〇",
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 Z͑͗a̴l̷g̸o̶", "\u0301 alone \u20dd", "ＦＵＬＬ ｗｉｄｔｈ １２３ ！？",
    "1", "12", "123", "1234", "12345", "123456789", "3.14159 1,000,000 -42 +7 0x1F 1e-10 10% $5.99 #1", "1st 2nd a1b2c3 9a 99a 999a 9999a",
    "٠١٢٣٤٥٦٧٨٩ ۰۱۲ ०१२ ๐๑๒ ０１２", "192.168.0.1 2024-12-31T23:59:59Z +49(0)30/123456",
    "def f(x):\n    if x:\n        return [y for y in x]\n\n\nclass A:\n\tpass\n", "int main() {\n\tprintf(\"%d\\n\", 42);\n\t\treturn 0;\n}\n",
    "for (let i = 0; i < n; i++) { a[i] ||= b?.c ?? d; }", "SELECT * FROM t WHERE a='b''c' AND d<>1;-- done", "<div class=\"a\">&nbsp;</div><!-- c -->",
    "{\"a\": [1, 2.5, null], \"b\": {\"c\": \"d\\n\"}}", "https://example.com/path?q=1&r=a%20b#frag user@example.org", "$E=mc^2$ \\frac{1}{2} \\alpha_{ij}",
    "# Title\n\n* item\n  * sub\n\n```rust\nfn main() {}\n```\n| a | b |\n|---|---|\n", "...", "!!!", "?!?!", "----", "____", "====", "###", "***", "---\n---", "//\n//", "/\n\n/",
    "“quotes” ‘single’ «guillemets» „low“ – — … ‰", "a'b 'a' ''a'' 's 't 're 've 'm 'll 'd 'S 'T 'RE 'x ’s", "'ſ 'K", "can''t 'sl 'rea",
    "(a)[b]{c}<d>", "a.b.c...d", "a_b__c", "~`|^", "$+<=>^~|`", "£€¥₿¢", "©®™°§¶", "\u00ad soft\u00adhyphen", "\u200b zero\u200bwidth \u200d \ufeff bom",
    "\u202a bidi \u202e txet \u202c", "\ufffd replacement \ufffd\ufffd", "\ue000 private \U000f0000 \U0010ffff", "\u0378 unassigned \U000e0fff",
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_start|><|im_end|><|im_start|>",
    "a<|im_end|>b", " <|im_end|> ", "\n<|im_end|>\n", "<|im_end", "<|im_end|", "<<|im_end|>>", "<|endoftext|>", "x<|endoftext|><|endoftext|>y", "<|IM_END|>", "<| im_end |>",
    "<think>\nhm\n</think>\n\nanswer", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", "<empty_output><file_sep><jupyter_code>", "[INST] hi [/INST]", "<s>a</s>", "<repo_name>a/b",
    "<tool_call<tool_call>>", "  <think>  </think>  ",
]
SPACES = [
    "", " ", "  ", "   ", "    ", "     ", "        ", " " * 17, " " * 64, "\n", "\n\n", "\n\n\n", "\n" * 17, "\t", "\t\t", "\t\t\t\t", "\r", "\r\n", "\r\n\r\n", "\n\r", " \n", "\n ", " \n ",
    "  \n  ", "\n \n", "\t\n", "\n\t", " \t ", "\t \t", "a ", " a", "  a", "   a", "a  ", "a  b", "a   b", "a    b", "a\nb", "a\n\nb", "a \nb", "a\n b", "a \n b", "a  \n\n  b", "a\tb", "a\t\tb",
    "a \tb", "a\t b", "a\r\nb", "a\r\n\r\nb", "1 2", "1  2", "1   2", "1\n2", "! !", "!  !", "!\n!", "!\n\n!", "!\r\n", "! \n", ".\n\n\n  .", "a!\n", "a! \n b", "\x0b", "\x0c", "\x0b\x0c a",
    "\x1c\x1d\x1e\x1f", "a\x1cb", "\x85", "a\x85b", "\xa0", "a\xa0b", "\xa0\xa0a", " \xa0 ", "\u1680 a", "\u2000\u2001\u2002a", "\u2028\u2029", "a\u2028b", "\u202fa", "\u205fa", "\u3000", "\u3000a", "a\u3000\u3000b",
    "\u180ea", "\u200ba", "\x00", "a\x00b", "\x00\x00", "\x01\x02\x03", "\x7f", "\x80\x9f", "a\x1bb", "\x1b[31mred\x1b[0m", "  1", "   1", "\n1", "  !", "   !", "  é", "  你", "  😀", "\n\n  x",
    "x  \n", "x\n  ", "x   \n\n\n   y", " \r\n ", "\r\r\n", "\n \r \t ", "a \u3000 b", "\u3000\n", "\n\u3000", "\u2003 x",
]


def make_corpus():
    texts = WORDS + SPACES
    chance = random.Random(20240)
    alphabet = ["a", "B", "ß", "É", "я", "Я", "中", "の", "한", "ก", "ا", "े", "é", "\u0301", "😀", "\u200d", "1", "2", "٣", "½", " ", " ", "  ", "\n", "\t", "\r", "'", "s", "'ll", ".", "!", "/", "-", "_", "$",
                "\xa0", "\u3000", "\x00", "<|im_end|>", "<think>", "word", "THE", "Ab", "000", "\ufffd", "𝒷", "\x85", "‐", "“"]
    for _ in range(120):
        texts.append("".join(chance.choice(alphabet) for _ in range(chance.randint(2, 24))))
    return texts


def byte_alphabet():
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def train(texts):
    """A byte-level BPE over whole texts: merges cross every border."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=byte_alphabet(), show_progress=False, max_token_length=12, min_frequency=2)
    plain = [text for text in texts if not any(part in text for part in ["<|", "think>", "tool_call"])]
    lines = plain * 2 + [f"{a}{b}" for a in plain[: len(WORDS)] for b in SPACES[::7]]
    tokenizer.train_from_iterator(lines, trainer)
    state = json.loads(tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(state["vocab"].items(), key=lambda item: item[1])]
    return tokens, [tuple(merge) for merge in state["merges"]]


def write_gguf(path, pre, tokens, merges):
    writer = gguf.GGUFWriter(str(path), "llama")
    extra = [("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<think>", 4), ("</think>", 4), ("   ", 4), ("<tool_call>", 4), ("<unused0>", 5)]
    # A word of the texts that is a token without merges: shows ignore_merges.
    known = set(tokens)
    words = [word for text in WORDS for word in text.split() if word.isascii() and word.isalpha()]
    extra.append((max((word for word in words if word not in known), key=len), 1))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [token for token, _ in extra])
    writer.add_token_types([1] * len(tokens) + [kind for _, kind in extra])
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_bos_token_id(len(tokens) + 1)
    writer.add_eos_token_id(len(tokens) + 2)
    writer.add_add_eos_token(pre == "gpt-2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_gguf(texts):
    folder = ROOT / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = train(texts)
    ids = {}
    for pre in PRE_TOKENIZERS:
        path = folder / f"{pre}.gguf"
        write_gguf(path, pre, tokens, merges)
        vocab = Vocab(path)
        ids[pre] = {"with_special": vocab.encode("Hi", True), "ids": [vocab.encode(text) for text in texts]}
        pieces = [b"".join(vocab.piece(token) for token in row) for row in ids[pre]["ids"]]
        for text, piece in zip(texts, pieces):
            assert piece == text.encode(), (pre, text, piece)
    (folder / "ids.json").write_text(json.dumps(ids, separators=(",", ":")) + "\n")


def json_tokenizers(texts):
    """One tiny tokenizer for each kind of decoder that models come with."""
    lines = [text for text in WORDS if "<|" not in text]
    specials = [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]

    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    byte_level.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=500, initial_alphabet=byte_alphabet(), show_progress=False))
    byte_level.add_special_tokens(specials)
    byte_level.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("日本", special=False)])
    byte_level.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", byte_level.token_to_id("<s>"))])
    # What training left in the file must not cut requests.
    byte_level.enable_truncation(8)
    byte_level.enable_padding(length=8, pad_id=0, pad_token="!")

    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    spm = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spm.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spm.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    spm.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>"] + fallback, limit_alphabet=60, show_progress=False))
    spm.add_special_tokens(specials)

    metaspace = Tokenizer(models.Unigram())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    metaspace.train_from_iterator([line for line in lines if line.isascii()], trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False))
    metaspace.add_special_tokens(specials)

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    wordpiece.decoder = decoders.WordPiece()
    wordpiece.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"], show_progress=False))
    wordpiece.add_special_tokens(specials)

    suffix = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    suffix.pre_tokenizer = pre_tokenizers.Whitespace()
    suffix.decoder = decoders.BPEDecoder(suffix="</w>")
    suffix.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False))
    return {"byte_level": byte_level, "spm": spm, "metaspace": metaspace, "wordpiece": wordpiece, "suffix": suffix}


def make_json(texts):
    folder = ROOT / "json"
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for kind, tokenizer in json_tokenizers(texts).items():
        (folder / f"{kind}.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n")
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        expected[kind] = {
            "with_special": tokenizer.encode("Hi").ids,
            "ids": ids,
            "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        }
    (folder / "ids.json").write_text(json.dumps(expected, ensure_ascii=False, separators=(",", ":")) + "\n")


def main():
    texts = make_corpus()
    ROOT.mkdir(parents=True, exist_ok=True)
    (ROOT / "corpus.json").write_text(json.dumps(texts, ensure_ascii=True, indent=0) + "\n")
    default = Vocab(sys.argv[1])
    ids = [default.encode(text) for text in texts]
    decoded = {}
    for index, (text, row) in enumerate(zip(texts, ids)):
        shown = b"".join(default.piece(token) for token in row).decode(errors="replace")
        if shown != text:
            decoded[index] = shown
    (ROOT / "smollm2.json").write_text(json.dumps({"ids": ids, "decoded": decoded}, separators=(",", ":")) + "\n")
    make_gguf(texts)
    make_json(texts)


if __name__ == "__main__":
    main()
