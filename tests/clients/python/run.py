"""openai-python against a running server: every parameter, in chat and completions, streamed and not.

KVERN_BASE_URL (without /v1) and KVERN_API_KEY say where the server is.
"""

import concurrent.futures

import openai
from harness import BASE_URL, MODEL, MODES, ask, client, expect_error, main, metric, post, token_id, wait_until

END = token_id("<|im_end|>")
FORCED_TEXT = " the"
FORCED = token_id(FORCED_TEXT)
# Far above what any logit is: the token is always the likeliest one.
FORCE = {str(FORCED): 100}
FORCE_END = {str(END): 100}


# --- each of these runs in all four modes ---


def answers(kind, stream):
    answer = ask(kind, stream)
    assert answer.text.strip(), answer
    assert answer.usage.completion_tokens > 0, answer


def greedy_repeats(kind, stream):
    assert ask(kind, stream).text == ask(kind, not stream).text


def max_tokens(kind, stream):
    answer = ask(kind, stream, max_tokens=7, ignore_eos=True)
    assert (answer.reason, answer.usage.completion_tokens) == ("length", 7), answer
    one = ask(kind, stream, max_tokens=1, ignore_eos=True)
    assert (one.reason, one.usage.completion_tokens) == ("length", 1), one


def seed(kind, stream):
    def text(seed):
        return ask(kind, stream, temperature=1.3, seed=seed).text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1, "four seeds gave one text"


def seed_without_stream_is_seed_with_stream(kind, stream):
    texts = {ask(kind, streamed, temperature=1.0, seed=11).text for streamed in (stream, not stream)}
    assert len(texts) == 1, texts


def stop_string(kind, stream):
    free = ask(kind, stream, max_tokens=32).text
    middle = len(free) // 2
    stop = free[middle : middle + 5]
    expected = free[: free.index(stop)]
    for given in (stop, [stop], ["\u0000never", stop, "\u0001never"]):
        answer = ask(kind, stream, max_tokens=32, stop=given)
        assert (answer.text, answer.reason) == (expected, "stop"), (answer, expected)
    never = ask(kind, stream, max_tokens=32, stop=[stop[:3] + "\u0000"])
    assert never.text == free, "text that may begin a stop string was lost"


def stop_token_ids(kind, stream):
    answer = ask(kind, stream, logit_bias=FORCE, stop_token_ids=[FORCED])
    assert (answer.text, answer.reason, answer.usage.completion_tokens) == ("", "stop", 1), answer


def logit_bias(kind, stream):
    answer = ask(kind, stream, logit_bias=FORCE, max_tokens=6)
    assert answer.text.strip() == (FORCED_TEXT * 6).strip(), answer
    free = ask(kind, stream).text
    first = post("/tokenize", {"model": MODEL, "prompt": free, "add_special_tokens": False})["tokens"][0]
    without = ask(kind, stream, logit_bias={str(first): -100})
    assert without.text != free, f"the first token was forbidden and still said: {free!r}"


def ignore_eos(kind, stream):
    ended = ask(kind, stream, logit_bias=FORCE_END)
    assert (ended.text, ended.reason) == ("", "stop"), ended
    ignored = ask(kind, stream, logit_bias=FORCE_END, ignore_eos=True, max_tokens=5)
    assert (ignored.reason, ignored.usage.completion_tokens) == ("length", 5), ignored


def min_tokens(kind, stream):
    answer = ask(kind, stream, logit_bias=FORCE_END, min_tokens=4)
    assert answer.reason == "stop" and answer.usage.completion_tokens in (4, 5), answer
    assert answer.text, "the tokens before the end are text"


def logprobs(kind, stream):
    asked = {"logprobs": True, "top_logprobs": 3} if kind == "chat" else {"logprobs": 3}
    answer = ask(kind, stream, **asked)
    entries = answer.logprobs[0]
    assert len(entries) == answer.usage.completion_tokens, (len(entries), answer.usage)
    for token, logprob, _, top in entries:
        assert logprob <= 0 and all(value <= 0 for _, value in top), (token, logprob, top)
        assert len(top) in ((3,) if kind == "chat" else (3, 4)), top
        assert [value for _, value in top] == sorted((value for _, value in top), reverse=True), top
        assert abs(top[0][1] - logprob) < 1e-6, f"greedy takes the likeliest token: {token!r} of {top}"
    if kind == "chat":
        whole = b"".join(bytes(entry[2]) for entry in entries).decode()
        assert whole.startswith(answer.text), (whole, answer.text)
    else:
        assert "".join(entry[0] for entry in entries).startswith(answer.text), answer
    assert not ask(kind, stream).logprobs, "log-probabilities that nobody asked for"


def logprobs_without_alternatives(kind, stream):
    asked = {"logprobs": True} if kind == "chat" else {"logprobs": 0}
    answer = ask(kind, stream, max_tokens=4, ignore_eos=True, **asked)
    assert len(answer.logprobs[0]) == 4, answer
    assert all(len(top) <= 1 for *_, top in answer.logprobs[0]), answer


def choices(kind, stream):
    def texts():
        answer = ask(kind, stream, n=3, temperature=1.3, seed=5)
        assert sorted(answer.texts) == [0, 1, 2], answer
        return answer.texts

    first = texts()
    assert len(set(first.values())) > 1, f"three choices are one: {first}"
    assert first == texts(), "the same seed gave other choices"
    counted = ask(kind, stream, n=2, max_tokens=5, ignore_eos=True)
    assert counted.usage.completion_tokens == 10, counted


def narrow_sampling_is_greedy(kind, stream):
    greedy = ask(kind, stream).text
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        text = ask(kind, stream, temperature=1.5, seed=3, **narrow).text
        assert text == greedy, (narrow, text, greedy)


def penalties(kind, stream):
    prompt = "Repeat: one two one two one two one two one two"
    free = ask(kind, stream, prompt, max_tokens=48, ignore_eos=True).text
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}):
        text = ask(kind, stream, prompt, max_tokens=48, ignore_eos=True, **penalty).text
        assert text != free, f"{penalty} changed nothing"
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1.0}
    assert ask(kind, stream, prompt, max_tokens=48, ignore_eos=True, **neutral).text == free


def cached_tokens(kind, stream):
    prompt = f"{kind} {stream}: " + "The quick brown fox jumps over the lazy dog. " * 20
    first, second = ask(kind, stream, prompt), ask(kind, stream, prompt)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= first.usage.prompt_tokens - 17, (first.usage, second.usage)
    assert cached > first.usage.prompt_tokens_details.cached_tokens, (first.usage, second.usage)
    assert first.text == second.text


def unused_parameters(kind, stream):
    assert ask(kind, stream, user="someone", no_such_parameter={"a": [1]}).text == ask(kind, stream).text


def whole_characters(kind, stream):
    # Characters of several tokens. A chunk that broke one would hold a replacement character that the whole text has not.
    # What is sampled depends on the last bits of the logits, so several seeds are asked for such characters.
    asked = {"prompt": "Repeat: 🌍🚀 世界 🌍🚀 世界 🌍🚀 世界", "temperature": 1.2, "max_tokens": 64}
    pairs = [{ask(kind, streamed, seed=seed, **asked).text for streamed in (stream, not stream)} for seed in range(6)]
    assert all(len(pair) == 1 for pair in pairs), pairs
    assert any(ord(character) > 127 for pair in pairs for text in pair for character in text), pairs


# --- and these once ---


def max_completion_tokens():
    answer = ask("chat", False, max_completion_tokens=5, max_tokens=None, ignore_eos=True)
    assert (answer.reason, answer.usage.completion_tokens) == ("length", 5), answer


def stream_without_usage():
    for kind in ("chat", "completions"):
        assert ask(kind, True, stream_options=None).text
        assert ask(kind, True, stream_options={"include_usage": False}).text


def conversations():
    messages = [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    assert ask("chat", False, messages).text.strip()
    assert ask("chat", False, messages).text != ask("chat", False, messages[-1:]).text


def prompts_of_completions():
    tokens = post("/tokenize", {"model": MODEL, "prompt": "Once upon a time"})["tokens"]
    assert ask("completions", False, tokens).text == ask("completions", False, "Once upon a time").text
    two = ask("completions", False, ["Once upon a time", "The sea"])
    assert sorted(two.texts) == [0, 1], two
    assert two.texts[1] == ask("completions", False, "The sea").text


def tokens_round_trip():
    text = "Grüße, 世界! \U0001f30d  two  spaces\n"
    tokens = post("/tokenize", {"model": MODEL, "prompt": text, "add_special_tokens": False})
    assert tokens["count"] == len(tokens["tokens"]), tokens
    assert post("/detokenize", {"model": MODEL, "tokens": tokens["tokens"]})["prompt"] == text


def models():
    (model,) = [model for model in client.models.list() if model.id == MODEL]
    assert model.object == "model" and model.owned_by, model
    assert client.models.retrieve(MODEL).id == MODEL


def bad_requests():
    cases = [
        ({"temperature": 3}, ["temperature"]),
        ({"temperature": -1}, ["temperature"]),
        ({"top_p": 0}, ["top_p"]),
        ({"top_p": 1.5}, ["top_p"]),
        ({"min_p": 2}, ["min_p"]),
        ({"top_k": -7}, ["top_k"]),
        ({"presence_penalty": 3}, ["presence_penalty"]),
        ({"frequency_penalty": -3}, ["frequency_penalty"]),
        ({"repetition_penalty": 0}, ["repetition_penalty"]),
        ({"n": 0}, ["n"]),
        ({"max_tokens": -1}, ["max_tokens"]),
        ({"max_tokens": 10**9}, ["max_tokens"]),
        ({"logit_bias": {"5": 101}}, ["logit_bias"]),
        ({"logit_bias": {"nine": 1}}, ["logit_bias"]),
        ({"stop": [""]}, ["stop"]),
        ({"temperature": "hot"}, ["temperature"]),
        ({"prompt": "word " * 20_000}, ["token"]),
    ]
    for kind, stream in MODES:
        for params, words in cases:
            expect_error(openai.BadRequestError, words, lambda: ask(kind, stream, **params))
    for params, words in (
        ({"prompt": []}, ["messages"]),
        ({"top_logprobs": 3}, ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, ["tools"]),
        ({"response_format": {"type": "json_object"}}, ["response_format"]),
    ):
        expect_error(openai.BadRequestError, words, lambda: ask("chat", False, **params))


def unknown_model():
    call = lambda: client.chat.completions.create(model="nobody/knows", messages=[{"role": "user", "content": "Hi"}])
    error = expect_error(openai.NotFoundError, ["nobody/knows"], call)
    assert error.code == "model_not_found", error.code
    expect_error(openai.NotFoundError, ["nobody/knows"], lambda: client.models.retrieve("nobody/knows"))


def wrong_key():
    other = client.with_options(api_key="sk-wrong")
    error = expect_error(openai.AuthenticationError, [], lambda: other.models.list())
    assert error.code == "invalid_api_key", error.code


def leaving_frees_the_request():
    for create, body in (
        (client.chat.completions.create, {"messages": [{"role": "user", "content": "Count for ever."}]}),
        (client.completions.create, {"prompt": "1, 2, 3,"}),
    ):
        stream = create(model=MODEL, stream=True, max_tokens=1500, extra_body={"ignore_eos": True}, **body)
        # The role of a chat answer comes before the engine has begun; text does not.
        first_text = (lambda choice: choice.delta.content) if "messages" in body else (lambda choice: choice.text)
        next(chunk for chunk in stream if first_text(chunk.choices[0]))
        assert metric("vllm:num_requests_running") >= 1
        stream.close()
        wait_until(lambda: metric("vllm:num_requests_running") == 0, "the request that its client left ends")
        wait_until(lambda: metric("vllm:kv_cache_usage_perc") == 0, "its blocks are free")


def company_changes_nothing():
    asked = [{"prompt": f"Tell me about the number {i}.", "seed": i, "temperature": 1.0} for i in range(8)]
    alone = [ask("chat", True, **params).text for params in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda params: ask("chat", True, **params).text, asked))
    assert together == alone, list(zip(together, alone))


def counters_move():
    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:e2e_request_latency_seconds_count"]
    before = [metric(name) for name in names]
    usage = ask("chat", False, max_tokens=5, ignore_eos=True).usage
    expected = [usage.prompt_tokens, 5, 1]
    grown = lambda: [metric(name) - start for name, start in zip(names, before)] == expected
    wait_until(grown, f"{names} grow by {expected}")


IN_EACH_MODE = [
    answers, greedy_repeats, max_tokens, seed, seed_without_stream_is_seed_with_stream, stop_string, stop_token_ids, logit_bias,
    ignore_eos, min_tokens, logprobs, logprobs_without_alternatives, choices, narrow_sampling_is_greedy, penalties,
    cached_tokens, unused_parameters, whole_characters,
]  # fmt: skip
ONCE = [
    max_completion_tokens, stream_without_usage, conversations, prompts_of_completions, tokens_round_trip, models,
    bad_requests, unknown_model, wrong_key, leaving_frees_the_request, company_changes_nothing, counters_move,
]  # fmt: skip


def in_mode(check, kind, stream):
    return f"{check.__name__}, {kind}{', streamed' if stream else ''}", lambda: check(kind, stream)


if __name__ == "__main__":
    print(f"openai-python {openai.__version__} against {BASE_URL}")
    each = [in_mode(check, *mode) for check in IN_EACH_MODE for mode in MODES]
    main(each + [(check.__name__, check) for check in ONCE])
