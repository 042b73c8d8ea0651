// openai-node against a running server: every parameter, in chat and completions, streamed and not.
// KVERN_BASE_URL (without /v1) and KVERN_API_KEY say where the server is.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { BASE_URL, MODEL, MODES, ask, client, expectError, main, metric, tokenIds, waitUntil } from "./harness.mjs";

const FORCED_TEXT = " the";
const [FORCED] = await tokenIds(FORCED_TEXT);
const [END] = await tokenIds("<|im_end|>");
// Far above what any logit is: the token is always the likeliest one.
const FORCE = { [FORCED]: 100 };
const FORCE_END = { [END]: 100 };

const inEachMode = {
  async answers(kind, stream) {
    const answer = await ask(kind, stream);
    assert.ok(answer.text.trim() && answer.usage.completion_tokens > 0);
    assert.equal(answer.text, (await ask(kind, !stream)).text);
  },

  async maxTokens(kind, stream) {
    const { reason, usage } = await ask(kind, stream, { max_tokens: 7, ignore_eos: true });
    assert.deepEqual([reason, usage.completion_tokens], ["length", 7]);
  },

  async seed(kind, stream) {
    const text = async (seed) => (await ask(kind, stream, { temperature: 1.3, seed })).text;
    assert.equal(await text(7), await text(7));
    assert.ok(new Set([await text(1), await text(2), await text(3), await text(4)]).size > 1);
  },

  async stopStrings(kind, stream) {
    const free = (await ask(kind, stream, { max_tokens: 32 })).text;
    const middle = Math.floor(free.length / 2);
    const stop = free.slice(middle, middle + 5);
    for (const given of [stop, ["never \u0000", stop]]) {
      const answer = await ask(kind, stream, { max_tokens: 32, stop: given });
      assert.deepEqual([answer.text, answer.reason], [free.slice(0, free.indexOf(stop)), "stop"]);
    }
  },

  async stopTokenIds(kind, stream) {
    const answer = await ask(kind, stream, { logit_bias: FORCE, stop_token_ids: [FORCED] });
    assert.deepEqual([answer.text, answer.reason], ["", "stop"]);
  },

  async logitBias(kind, stream) {
    const answer = await ask(kind, stream, { logit_bias: FORCE, max_tokens: 6 });
    assert.equal(answer.text.trim(), FORCED_TEXT.repeat(6).trim());
  },

  async ignoreEosAndMinTokens(kind, stream) {
    const ended = await ask(kind, stream, { logit_bias: FORCE_END });
    assert.deepEqual([ended.text, ended.reason], ["", "stop"]);
    const ignored = await ask(kind, stream, { logit_bias: FORCE_END, ignore_eos: true, max_tokens: 5 });
    assert.deepEqual([ignored.reason, ignored.usage.completion_tokens], ["length", 5]);
    const late = await ask(kind, stream, { logit_bias: FORCE_END, min_tokens: 4 });
    assert.ok(late.reason === "stop" && late.usage.completion_tokens >= 4, JSON.stringify(late));
  },

  async logprobs(kind, stream) {
    const asked = kind === "chat" ? { logprobs: true, top_logprobs: 3 } : { logprobs: 3 };
    const answer = await ask(kind, stream, asked);
    const entries = answer.logprobs[0];
    assert.equal(entries.length, answer.usage.completion_tokens);
    assert.ok(entries.every((entry) => entry.logprob <= 0));
    if (kind === "chat") {
      const bytes = Uint8Array.from(entries.flatMap((entry) => entry.bytes));
      assert.ok(new TextDecoder().decode(bytes).startsWith(answer.text));
      assert.ok(entries.every((entry) => entry.top_logprobs.length === 3));
    }
    assert.equal((await ask(kind, stream)).logprobs.length, 0);
  },

  async choices(kind, stream) {
    const texts = async () => (await ask(kind, stream, { n: 3, temperature: 1.3, seed: 5 })).texts;
    const first = await texts();
    assert.equal(first.length, 3);
    assert.ok(new Set(first).size > 1);
    assert.deepEqual(await texts(), first);
  },

  async narrowSamplingIsGreedy(kind, stream) {
    const { text } = await ask(kind, stream);
    for (const narrow of [{ top_k: 1 }, { top_p: 1e-6 }, { min_p: 1 }]) {
      assert.equal((await ask(kind, stream, { temperature: 1.5, ...narrow })).text, text, JSON.stringify(narrow));
    }
  },

  async penalties(kind, stream) {
    const common = { prompt: "Repeat: one two one two one two one two one two", max_tokens: 48, ignore_eos: true };
    const { text } = await ask(kind, stream, common);
    for (const penalty of [{ presence_penalty: 2 }, { frequency_penalty: 2 }, { repetition_penalty: 1.5 }]) {
      assert.notEqual((await ask(kind, stream, { ...common, ...penalty })).text, text, JSON.stringify(penalty));
    }
  },

  async cachedTokens(kind, stream) {
    const prompt = `node ${kind} ${stream}: ` + "The quick brown fox jumps over the lazy dog. ".repeat(20);
    const first = await ask(kind, stream, { prompt });
    const second = await ask(kind, stream, { prompt });
    assert.ok(second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 17);
    assert.equal(second.text, first.text);
  },

  async unusedParameters(kind, stream) {
    const answer = await ask(kind, stream, { user: "someone", no_such_parameter: { a: [1] } });
    assert.equal(answer.text, (await ask(kind, stream)).text);
  },
};

const once = {
  async maxCompletionTokens() {
    const answer = await ask("chat", false, { max_tokens: undefined, max_completion_tokens: 5, ignore_eos: true });
    assert.deepEqual([answer.reason, answer.usage.completion_tokens], ["length", 5]);
  },

  async streamWithoutUsage() {
    for (const kind of ["chat", "completions"]) {
      assert.ok((await ask(kind, true, { stream_options: { include_usage: false } })).text);
    }
  },

  // The SDK's own reading of a chat stream, which is stricter than a loop over its chunks.
  async streamHelper() {
    const messages = [{ role: "user", content: "Write a short story about a lighthouse." }];
    const runner = client.chat.completions.stream({ model: MODEL, messages, max_tokens: 24, temperature: 0 });
    const whole = await runner.finalChatCompletion();
    assert.equal(whole.choices[0].message.content, (await ask("chat", false)).text);
  },

  async models() {
    assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
  },

  async errors() {
    const { BadRequestError, NotFoundError, AuthenticationError } = OpenAI;
    for (const [kind, stream] of MODES) {
      for (const [params, word] of [
        [{ temperature: 3 }, "temperature"],
        [{ top_p: 0 }, "top_p"],
        [{ n: 0 }, "n"],
        [{ max_tokens: -1 }, "max_tokens"],
        [{ logit_bias: { 5: 101 } }, "logit_bias"],
        [{ prompt: "word ".repeat(20_000) }, "token"],
      ]) {
        await expectError(BadRequestError, word, () => ask(kind, stream, params));
      }
    }
    await expectError(BadRequestError, "messages", () => ask("chat", false, { prompt: [] }));
    const tools = [{ type: "function", function: { name: "f" } }];
    await expectError(BadRequestError, "tools", () => ask("chat", false, { tools }));
    await expectError(NotFoundError, "nobody/knows", () => ask("chat", false, { model: "nobody/knows" }));
    await expectError(AuthenticationError, "", () => client.withOptions({ apiKey: "sk-wrong" }).models.list());
  },

  async leavingFreesTheRequest() {
    const messages = [{ role: "user", content: "Count for ever." }];
    const body = { model: MODEL, messages, max_tokens: 1500, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(body);
    for await (const chunk of stream) {
      assert.equal(chunk.object, "chat.completion.chunk");
      if (!chunk.choices[0].delta.content) continue; // The role comes before the engine has begun.
      assert.ok((await metric("vllm:num_requests_running")) >= 1);
      break; // Leaving the loop aborts the request.
    }
    await waitUntil(async () => (await metric("vllm:num_requests_running")) === 0, "the request that its client left ends");
  },

  async companyChangesNothing() {
    const asked = [...Array(8).keys()].map((i) => ({ prompt: `Tell me about the number ${i}.`, seed: i, temperature: 1 }));
    const alone = [];
    for (const params of asked) alone.push((await ask("chat", true, params)).text);
    const together = await Promise.all(asked.map((params) => ask("chat", true, params)));
    assert.deepEqual(together.map((answer) => answer.text), alone);
  },
};

console.log(`openai-node against ${BASE_URL}`);
const each = Object.entries(inEachMode).flatMap(([name, check]) =>
  MODES.map(([kind, stream]) => [`${name}, ${kind}${stream ? ", streamed" : ""}`, () => check(kind, stream)]),
);
await main([...each, ...Object.entries(once)]);
