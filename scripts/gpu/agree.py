#!/usr/bin/env python3
"""Compares the server on a GPU with transformers on the same GPU, over the HTTP API.

f32: greedy tokens must be the same, but where two are as likely as each other. bf16 and f16: the server's own tokens are
given to transformers in f32, which is the truth, and in the same type, which is the measure: the server's
log-probabilities may be off the truth as far as those of transformers in that type are, times a factor.

With --mixed prompts come while others are answered, after one that was alone, for servers whose steps run on a part of
the GPU beside others and on all of it alone: both must have been.
"""

import concurrent.futures
import pathlib
import re
import sys
import time

import torch
import transformers

import server

TOKENS = 64
# Log-probabilities of two tokens that count as one as likely as the other, in f32.
TIE = 2e-3
# How many times as far off the truth as transformers the server may be, on average and at most.
FACTORS = (1.5, 3.0)
# And what it may be off in any case: transformers may be right by luck.
FLOORS = (1e-3, 2e-2)
# Types of 16 bits, as the server calls them and as torch does.
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}
# How often all prompts are asked with --mixed, and how far apart they come: a few steps, so that most come beside
# others.
ROUNDS, APART_S = 3, 0.015


def load(folder, dtype: torch.dtype):
    """The model in `dtype`. Not cast after loading: rotary frequencies have to stay as the library keeps them."""
    for name in ("dtype", "torch_dtype"):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **{name: dtype})
        if next(model.parameters()).dtype == dtype:
            return model.to("cuda").eval()
    sys.exit(f"expected weights in {dtype}, found {next(model.parameters()).dtype}")


class Vocabulary:
    """Ids of tokens by their texts, where a text has one."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))], clean_up_tokenization_spaces=False)
        self.ids = {}
        for token, text in enumerate(texts):
            self.ids[text] = None if text in self.ids else token

    def prompt(self, text: str) -> "list[int]":
        return self.tokenizer(text)["input_ids"]

    def known(self, texts: "list[str]") -> "list[int]":
        """Ids of the first tokens; it ends at a text that several have, as pieces of a character do."""
        found = []
        for text in texts:
            token = self.ids.get(text)
            if token is None:
                break
            found.append(token)
        return found


@torch.inference_mode()
def logprobs(model, prompt: "list[int]", answer: "list[int]") -> torch.Tensor:
    """[answer, vocabulary]: of every token at every place of the answer, in f32."""
    ids = torch.tensor([prompt + answer], device="cuda")
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1:-1].float()
    return torch.log_softmax(logits, dim=-1)


def ask(options, dtype: str, prompts: "list[list[int]]") -> "list[dict]":
    flags = ["--device", options.device, "--dtype", dtype, *options.flag]
    log = options.logs / f"server-agree-{dtype}.log"
    if options.mixed:
        flags.append("--log-level=kvern=trace")
    with server.running(options.kvern, options.model, flags, log) as running:
        def one(prompt: "list[int]") -> dict:
            return running.complete(prompt, TOKENS, 1)["logprobs"]

        found = mixed(one, prompts) if options.mixed else [one(prompt) for prompt in prompts]
    if options.mixed:
        check_shares(log)
    return found


def mixed(one, prompts: "list[list[int]]") -> "list[dict]":
    """One prompt alone, then rounds in which prompts come while others are answered; the last round's answers."""
    one(prompts[0])
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(ROUNDS):
            answers = []
            for prompt in prompts:
                answers.append(pool.submit(one, prompt))
                time.sleep(APART_S)
            found = [answer.result() for answer in answers]
    return found


def check_shares(log: pathlib.Path) -> None:
    """Steps ran on all of the GPU and on parts of it."""
    shares = re.findall(r'\bshare\W+(Whole|Part)\b', log.read_text(errors="replace"))
    whole, part = shares.count("Whole"), shares.count("Part")
    changes = sum(before != after for before, after in zip(shares, shares[1:]))
    print(f"{whole} steps on all of the GPU, {part} on a part of it, "
          f"{changes} times another than the step reported before")
    if not whole or not part:
        sys.exit("expected steps on all of the GPU and on parts of it")


def check_f32(options, truth, vocabulary: Vocabulary, prompts: "list[list[int]]") -> bool:
    same, compared, wrong = 0, 0, []
    for prompt, found in zip(prompts, ask(options, "f32", prompts)):
        answer = vocabulary.known(found["tokens"])
        if not answer:
            wrong.append(f"expected tokens of the vocabulary, found {found['tokens'][:4]}")
            continue
        expected = logprobs(truth, prompt, answer)
        # Given the server's own tokens so far, each must be the likeliest, or as likely as that.
        gaps = expected.max(dim=-1).values - expected.gather(1, torch.tensor(answer, device="cuda")[:, None])[:, 0]
        same += int((gaps == 0).sum())
        compared += len(answer)
        wrong += [f"token {at} is {vocabulary.tokenizer.decode([answer[at]])!r}, {gap:.4f} behind the likeliest"
                  for at, gap in enumerate(gaps.tolist()) if gap > TIE]
    good = not wrong and compared > 0
    print(f"f32: {same} of {compared} tokens are transformers' own: {'pass' if good else 'FAIL'}")
    print("".join(f"  {text}\n" for text in wrong), end="")
    return good


def check_16_bits(options, dtype: str, truth, vocabulary: Vocabulary, prompts: "list[list[int]]") -> bool:
    peer = load(options.model, HALVES[dtype])
    ours, theirs = [], []
    for prompt, found in zip(prompts, ask(options, dtype, prompts)):
        answer = vocabulary.known(found["tokens"])
        if not answer:
            continue
        chosen = torch.tensor(answer, device="cuda")[:, None]
        exact = logprobs(truth, prompt, answer).gather(1, chosen)[:, 0]
        said = torch.tensor(found["token_logprobs"][:len(answer)], device="cuda")
        ours.append((said - exact).abs())
        theirs.append((logprobs(peer, prompt, answer).gather(1, chosen)[:, 0] - exact).abs())
    if not ours:
        print(f"{dtype}: expected tokens of the vocabulary, found none: FAIL")
        return False
    ours, theirs = torch.cat(ours), torch.cat(theirs)
    good = True
    for name, of, factor, floor in zip(("mean", "max"), (torch.mean, torch.max), FACTORS, FLOORS):
        found, limit = of(ours).item(), max(floor, factor * of(theirs).item())
        good = good and found <= limit
        print(f"{dtype}, {name} over {len(ours)} tokens: off by {found:.5f}, "
              f"transformers in {dtype} by {of(theirs).item():.5f} (limit {limit:.5f}): "
              f"{'pass' if found <= limit else 'FAIL'}")
    return good


def main() -> None:
    parser = server.arguments(__doc__.splitlines()[0])
    parser.add_argument("--mixed", action="store_true", help="prompts come while others are answered")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    vocabulary = Vocabulary(transformers.AutoTokenizer.from_pretrained(options.model))
    prompts = [vocabulary.prompt(text) for text in server.PROMPTS]
    truth = load(options.model, torch.float32)
    results = [check_f32(options, truth, vocabulary, prompts)]
    results += [check_16_bits(options, dtype, truth, vocabulary, prompts) for dtype in HALVES]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
