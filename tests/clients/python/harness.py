"""What the checks share: the client, one way to ask in all four modes, and the count."""

import dataclasses
import json
import os
import sys
import time
import traceback
import urllib.request

from openai import OpenAI

BASE_URL = os.environ["KVERN_BASE_URL"].rstrip("/")
API_KEY = os.environ.get("KVERN_API_KEY", "unused")

# No retries: a server error must be seen, not smoothed over.
client = OpenAI(base_url=BASE_URL + "/v1", api_key=API_KEY, max_retries=0, timeout=120)
MODEL = client.models.list().data[0].id

# (endpoint, streamed): every check of generation runs in each.
MODES = [(kind, stream) for kind in ("chat", "completions") for stream in (False, True)]

# vLLM's parameters, which openai-python sends through `extra_body`.
EXTRA = {"top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "no_such_parameter"}


@dataclasses.dataclass
class Answer:
    """An answer as its client sees it, streamed or not. Lists are by choice index."""

    texts: dict = dataclasses.field(default_factory=dict)
    reasons: dict = dataclasses.field(default_factory=dict)
    logprobs: dict = dataclasses.field(default_factory=dict)
    usage: object = None

    @property
    def text(self):
        assert list(self.texts) == [0], f"expected one choice, found {sorted(self.texts)}"
        return self.texts[0]

    @property
    def reason(self):
        return self.reasons[0]


# What an instructed model goes on with for a while, in each endpoint.
PROMPTS = {"chat": "Write a short story about a lighthouse.", "completions": "Once upon a time, there was a lighthouse"}


def ask(kind, stream, prompt=None, **params):
    """Asks in one mode and checks, on the way, all that holds for every answer. A parameter of None is not sent."""
    prompt = PROMPTS[kind] if prompt is None else prompt
    extra = {name: params.pop(name) for name in list(params) if name in EXTRA}
    if kind == "chat":
        create, params["messages"] = client.chat.completions.create, prompt
        if isinstance(prompt, str):
            params["messages"] = [{"role": "user", "content": prompt}]
    else:
        create, params["prompt"] = client.completions.create, prompt
    if stream:
        params.setdefault("stream_options", {"include_usage": True})
    params.setdefault("max_tokens", 24)
    params.setdefault("temperature", 0)
    params = {name: value for name, value in params.items() if value is not None}
    result = create(model=MODEL, stream=stream, extra_body=extra or None, **params)
    return from_stream(kind, result, params) if stream else from_whole(kind, result)


def check_head(kind, stream, message):
    prefix, name = {"chat": ("chatcmpl-", "chat.completion"), "completions": ("cmpl-", "text_completion")}[kind]
    assert message.id.startswith(prefix), message.id
    assert message.object == name + (".chunk" if kind == "chat" and stream else ""), message.object
    assert message.model == MODEL, message.model
    assert abs(message.created - time.time()) < 600, message.created


def check_usage(usage):
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage
    assert usage.prompt_tokens > 0, usage
    assert 0 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens, usage


def from_whole(kind, result):
    check_head(kind, False, result)
    check_usage(result.usage)
    answer = Answer(usage=result.usage)
    for choice in result.choices:
        if kind == "chat":
            assert choice.message.role == "assistant", choice
            text = choice.message.content
        else:
            text = choice.text
        assert isinstance(text, str), choice
        assert choice.finish_reason in ("stop", "length"), choice
        answer.texts[choice.index] = text
        answer.reasons[choice.index] = choice.finish_reason
        if choice.logprobs is not None:
            answer.logprobs[choice.index] = logprobs_of(kind, choice.logprobs)
    return answer


def from_stream(kind, chunks, params):
    answer, ids = Answer(), set()
    for chunk in chunks:
        check_head(kind, True, chunk)
        ids.add(chunk.id)
        assert answer.usage is None, "a chunk followed the usage"
        if not chunk.choices:
            check_usage(chunk.usage)
            answer.usage = chunk.usage
            continue
        assert chunk.usage is None, chunk
        for choice in chunk.choices:
            index = choice.index
            assert index not in answer.reasons, "a chunk followed the finish reason"
            first = index not in answer.texts
            answer.texts.setdefault(index, "")
            if kind == "chat":
                assert (choice.delta.role == "assistant") if first else (choice.delta.role is None), choice
                text = choice.delta.content or ""
            else:
                text = choice.text
            answer.texts[index] += text
            if choice.logprobs is not None:
                answer.logprobs.setdefault(index, []).extend(logprobs_of(kind, choice.logprobs))
            if choice.finish_reason is not None:
                assert choice.finish_reason in ("stop", "length"), choice
                answer.reasons[index] = choice.finish_reason
    assert len(ids) == 1, ids
    assert sorted(answer.texts) == sorted(answer.reasons), answer
    wanted = params.get("stream_options", {}).get("include_usage", False)
    assert (answer.usage is not None) == wanted, answer
    return answer


def logprobs_of(kind, logprobs):
    """Per token: (token, logprob, bytes or None, [(token, logprob) ...] likeliest first)."""
    if kind == "chat":
        entries = logprobs.content
        for entry in entries:
            assert bytes(entry.bytes).decode(errors="replace") == entry.token or "\ufffd" in entry.token, entry
        return [(e.token, e.logprob, e.bytes, [(t.token, t.logprob) for t in e.top_logprobs]) for e in entries]
    count = len(logprobs.tokens)
    assert count == len(logprobs.token_logprobs) == len(logprobs.text_offset), logprobs
    assert logprobs.text_offset == sorted(logprobs.text_offset), logprobs
    tops = logprobs.top_logprobs or [{}] * count
    tops = [sorted(top.items(), key=lambda pair: -pair[1]) for top in tops]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, [None] * count, tops))


def post(path, body):
    """A JSON request outside of what openai-python has."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(BASE_URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def token_id(text):
    """The one token that a text is."""
    (token,) = post("/tokenize", {"model": MODEL, "prompt": text, "add_special_tokens": False})["tokens"]
    return token


def metric(name):
    """The value of a series with no labels beyond the common ones."""
    with urllib.request.urlopen(BASE_URL + "/metrics", timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4"), response.headers
        for line in response.read().decode().splitlines():
            if line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"no series {name}")


def wait_until(condition, what, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)  # Between two looks at the server; nothing depends on its length.


def expect_error(kind, words, call):
    """The call must raise exactly this error of the SDK, and its message must hold the words."""
    try:
        call()
    except kind as error:
        body = error.body
        assert isinstance(body, dict) and {"message", "type", "param", "code"} <= set(body), body
        for word in words:
            assert word in body["message"], f"{word!r} is not in {body['message']!r}"
        return error
    raise AssertionError(f"expected {kind.__name__}, found no error")


def main(checks):
    """Runs (name, function) pairs; prints the count; exits with 1 if one failed."""
    passed, failed = 0, 0
    for name, check in checks:
        try:
            check()
            passed += 1
        except Exception:  # Whatever it is, it is this check's failure, and the others still run.
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr)
    print(f"openai-python: {passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)
