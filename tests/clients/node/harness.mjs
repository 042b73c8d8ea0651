// What the checks share: the client, one way to ask in all four modes, and the count.

import assert from "node:assert/strict";
import OpenAI from "openai";

export const BASE_URL = process.env.KVERN_BASE_URL.replace(/\/$/, "");
export const API_KEY = process.env.KVERN_API_KEY ?? "unused";

// No retries: a server error must be seen, not smoothed over.
export const client = new OpenAI({ baseURL: `${BASE_URL}/v1`, apiKey: API_KEY, maxRetries: 0, timeout: 120_000 });
export const MODEL = (await client.models.list()).data[0].id;

// [endpoint, streamed]: every check of generation runs in each.
export const MODES = ["chat", "completions"].flatMap((kind) => [false, true].map((stream) => [kind, stream]));

const HEADS = {
  chat: { prefix: "chatcmpl-", whole: "chat.completion", chunk: "chat.completion.chunk" },
  completions: { prefix: "cmpl-", whole: "text_completion", chunk: "text_completion" },
};

// What an instructed model goes on with for a while, in each endpoint.
const PROMPTS = { chat: "Write a short story about a lighthouse.", completions: "Once upon a time, there was a lighthouse" };

// Asks in one mode and checks, on the way, all that holds for every answer. vLLM's parameters are fields like any other here.
export async function ask(kind, stream, params = {}) {
  const { prompt = PROMPTS[kind], ...rest } = params;
  const body = { model: MODEL, stream, max_tokens: 24, temperature: 0, ...rest };
  if (stream) body.stream_options ??= { include_usage: true };
  if (kind === "completions") {
    body.prompt = prompt;
    const result = await client.completions.create(body);
    return stream ? fromStream(kind, result, body) : fromWhole(kind, result);
  }
  body.messages = typeof prompt === "string" ? [{ role: "user", content: prompt }] : prompt;
  const result = await client.chat.completions.create(body);
  return stream ? fromStream(kind, result, body) : fromWhole(kind, result);
}

function checkUsage(usage) {
  assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
  const cached = usage.prompt_tokens_details.cached_tokens;
  assert.ok(cached >= 0 && cached < usage.prompt_tokens, JSON.stringify(usage));
}

function checkHead(kind, stream, message) {
  const head = HEADS[kind];
  assert.ok(message.id.startsWith(head.prefix), message.id);
  assert.equal(message.object, stream ? head.chunk : head.whole);
  assert.equal(message.model, MODEL);
}

function entries(kind, logprobs) {
  return kind === "chat" ? logprobs.content : logprobs.tokens.map((token, i) => ({ token, logprob: logprobs.token_logprobs[i] }));
}

function fromWhole(kind, result) {
  checkHead(kind, false, result);
  checkUsage(result.usage);
  const answer = { texts: [], reasons: [], logprobs: [], usage: result.usage };
  for (const choice of result.choices) {
    if (kind === "chat") assert.equal(choice.message.role, "assistant");
    answer.texts[choice.index] = kind === "chat" ? choice.message.content : choice.text;
    answer.reasons[choice.index] = choice.finish_reason;
    if (choice.logprobs) answer.logprobs[choice.index] = entries(kind, choice.logprobs);
  }
  return finished(answer);
}

async function fromStream(kind, chunks, body) {
  const answer = { texts: [], reasons: [], logprobs: [], usage: null };
  for await (const chunk of chunks) {
    checkHead(kind, true, chunk);
    assert.equal(answer.usage, null, "a chunk followed the usage");
    if (chunk.choices.length === 0) {
      checkUsage(chunk.usage);
      answer.usage = chunk.usage;
    }
    for (const { index, delta, text, logprobs, finish_reason } of chunk.choices) {
      assert.equal(answer.reasons[index], undefined, "a chunk followed the finish reason");
      const piece = kind === "chat" ? (delta.content ?? "") : text;
      answer.texts[index] = (answer.texts[index] ?? "") + piece;
      if (logprobs) answer.logprobs[index] = [...(answer.logprobs[index] ?? []), ...entries(kind, logprobs)];
      if (finish_reason) answer.reasons[index] = finish_reason;
    }
  }
  assert.equal(answer.usage !== null, body.stream_options.include_usage === true);
  return finished(answer);
}

function finished(answer) {
  for (const [index, reason] of answer.reasons.entries()) {
    assert.ok(["stop", "length"].includes(reason), `choice ${index} ended with ${reason}`);
    assert.equal(typeof answer.texts[index], "string");
  }
  assert.equal(answer.texts.length, answer.reasons.length);
  return { ...answer, text: answer.texts[0], reason: answer.reasons[0] };
}

export async function tokenIds(text) {
  const response = await fetch(`${BASE_URL}/tokenize`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${API_KEY}` },
    body: JSON.stringify({ model: MODEL, prompt: text, add_special_tokens: false }),
  });
  assert.equal(response.status, 200);
  return (await response.json()).tokens;
}

// The value of a series with no labels beyond the common ones.
export async function metric(name) {
  const text = await (await fetch(`${BASE_URL}/metrics`)).text();
  const line = text.split("\n").find((line) => line.startsWith(`${name}{`));
  assert.ok(line, `no series ${name}`);
  return Number(line.slice(line.lastIndexOf(" ")));
}

export async function waitUntil(condition, what, seconds = 30) {
  const end = Date.now() + seconds * 1000;
  while (!(await condition())) {
    assert.ok(Date.now() < end, `${what}: not within ${seconds} s`);
    // Between two looks at the server; nothing depends on its length.
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

// The call must raise exactly this error of the SDK, and its message must hold the word.
export async function expectError(kind, word, call) {
  const error = await call().then(
    () => assert.fail(`expected ${kind.name}, found no error`),
    (error) => error,
  );
  assert.ok(error instanceof kind, `expected ${kind.name}, found ${error}`);
  assert.ok(error.error.message.includes(word), `${word} is not in ${error.error.message}`);
  return error;
}

// Runs [name, function] pairs; prints the count; exits with 1 if one failed.
export async function main(checks) {
  let passed = 0;
  let failed = 0;
  for (const [name, check] of checks) {
    try {
      await check();
      passed += 1;
    } catch (error) {
      failed += 1;
      console.error(`FAILED ${name}\n${error.stack}`);
    }
  }
  console.log(`openai-node: ${passed} passed, ${failed} failed`);
  process.exit(failed > 0 || passed === 0 ? 1 : 0);
}
