//! Shapes of whole answers, and what the engine is asked for.

use crate::fixture::{CONTEXT, Setup, chat_with, finished, says, token};
use crate::tiny_model::{IM_END, IM_START};
use kvern::request::{TokenEvent, TokenLogprobs};
use kvern_core::FinishReason;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[tokio::test]
async fn a_chat_answer_has_openais_shape() {
    let server = Setup::saying("hello ✓").start().await;
    let mut answer = server.ask(CHAT, chat_with(json!({"made_up_field": {"a": 1}, "user": "me"}))).await;
    let id = answer["id"].take();
    assert!(id.as_str().unwrap().starts_with("chatcmpl-"), "{id}");
    assert!(answer["created"].take().as_u64().unwrap() > 1_600_000_000);
    let prompt_tokens = "user\nhi\nassistant\n".len() + 3;
    let expected = json!({
        "id": null, "object": "chat.completion", "created": null, "model": "tiny",
        "choices": [{
            "index": 0, "message": {"role": "assistant", "content": "hello ✓", "refusal": null},
            "logprobs": null, "finish_reason": "stop", "stop_reason": null,
        }],
        "usage": {
            "prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 10, "completion_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
        "system_fingerprint": "fp_test",
    });
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn a_completion_answer_has_openais_shape() {
    let server = Setup::saying("world").start().await;
    let body = json!({"model": "org/tiny", "prompt": "hello ", "echo": true, "stop_token_ids": [IM_END]});
    let mut answer = server.ask(COMPLETIONS, body).await;
    assert!(answer["id"].take().as_str().unwrap().starts_with("cmpl-"));
    answer["created"].take();
    let expected = json!({
        "id": null, "object": "text_completion", "created": null, "model": "org/tiny",
        "choices": [{
            "index": 0, "text": "hello world", "logprobs": null, "finish_reason": "stop", "stop_reason": IM_END,
        }],
        "system_fingerprint": "fp_test",
        "usage": {
            "prompt_tokens": 6, "total_tokens": 12, "completion_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    });
    assert_eq!(answer, expected);
}

#[tokio::test]
async fn prompts_of_every_kind_are_answered_in_order() {
    let script = |request: &kvern::request::Request| {
        let text: Vec<u8> = request.prompt.iter().map(|&token| token as u8).collect();
        says(&String::from_utf8(text).unwrap())
    };
    let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
    let cases = [
        (json!("ab"), json!(["ab"])),
        (json!(["ab", "c"]), json!(["ab", "c"])),
        (json!([97, 98]), json!(["ab"])),
        (json!([[97, 98], [99]]), json!(["ab", "c"])),
    ];
    for (prompt, texts) in cases {
        let answer = server.ask(COMPLETIONS, json!({"prompt": prompt})).await;
        let said: Vec<Value> =
            answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect();
        assert_eq!(Value::from(said), texts, "{prompt}");
    }
}

#[tokio::test]
async fn every_parameter_reaches_the_engine() {
    let mut server = Setup::saying("x").start().await;
    let body = chat_with(json!({
        "max_tokens": 9, "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
        "presence_penalty": 1.5, "frequency_penalty": -1.5, "repetition_penalty": 1.25, "seed": 42,
        "stop": ["a", "b"], "stop_token_ids": [9, 3], "ignore_eos": true, "min_tokens": 2, "n": 2,
        "logit_bias": {"65": -100, "7": 2.5}, "logprobs": true, "top_logprobs": 4,
    }));
    server.ask(CHAT, body).await;
    let (first, _) = server.next_submission().await;
    let (second, _) = server.next_submission().await;
    assert_eq!(first.max_new_tokens, 7);
    let sampling = &first.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.5, 0.25, 3, 0.125));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty), (1.5, -1.5, 1.25));
    assert_eq!((sampling.seed, second.sampling.seed), (42, 43));
    assert_eq!((sampling.stop_tokens.as_slice(), sampling.min_tokens), ([3, 9].as_slice(), 2));
    assert_eq!(sampling.logit_bias, [(7, 2.5), (65, -100.0)]);
    assert_eq!(sampling.logprobs, Some(4));
    assert_ne!(first.id, second.id);
    assert_eq!(first.external_id, second.external_id);
    let text = "\u{1}user\nhi\u{2}\n\u{1}assistant\n";
    let prompt: Vec<u32> = text
        .bytes()
        .map(|byte| match byte {
            1 => IM_START,
            2 => IM_END,
            byte => u32::from(byte),
        })
        .collect();
    assert_eq!(first.prompt, prompt);
}

#[tokio::test]
async fn defaults_are_vllms() {
    let mut server = Setup::saying("x").start().await;
    server.ask(CHAT, chat_with(json!({}))).await;
    let (chat, _) = server.next_submission().await;
    assert_eq!(chat.max_new_tokens as usize, CONTEXT as usize - chat.prompt.len());
    assert_eq!((chat.sampling.temperature, chat.sampling.top_p, chat.sampling.top_k), (1.0, 1.0, 0));
    assert_eq!((chat.sampling.stop_tokens.as_slice(), chat.sampling.logprobs), ([IM_END].as_slice(), None));
    server.ask(COMPLETIONS, json!({"prompt": "a", "top_k": -1})).await;
    let (completion, _) = server.next_submission().await;
    assert_eq!((completion.max_new_tokens, completion.sampling.top_k), (16, 0));
    assert_ne!(chat.sampling.seed, completion.sampling.seed);
}

#[tokio::test]
async fn messages_in_parts_and_every_role_are_rendered() {
    let mut server = Setup::saying("x").start().await;
    let body = json!({"messages": [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
    ], "continue_final_message": true});
    server.ask(CHAT, body).await;
    let (request, _) = server.next_submission().await;
    let text: String =
        request.prompt.iter().filter_map(|&token| char::from_u32(token).filter(|_| token < 256)).collect();
    assert_eq!(text, "system\nbe\nuser\na\nb\nassistant\nc");
}

fn with_logprobs(byte: u8, logprob: f32) -> TokenEvent {
    let top = vec![(u32::from(b'z'), -0.25), (u32::from(byte), logprob)];
    TokenEvent::Token { token: u32::from(byte), logprobs: Some(Box::new(TokenLogprobs { logprob, top })) }
}

#[tokio::test]
async fn logprobs_have_both_shapes() {
    let script = |_: &kvern::request::Request| {
        vec![
            with_logprobs(0xc3, -0.5),
            with_logprobs(0xa9, f32::NEG_INFINITY),
            with_logprobs(b'x', -1.0),
            finished(FinishReason::Length, 3),
        ]
    };
    let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
    let chat = server.ask(CHAT, chat_with(json!({"logprobs": true, "top_logprobs": 2}))).await;
    assert_eq!(chat["choices"][0]["message"]["content"], "éx");
    assert_eq!(chat["choices"][0]["finish_reason"], "length");
    let content = chat["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[1]["logprob"], -9999.0);
    assert_eq!(
        content[2],
        json!({"token": "x", "logprob": -1.0, "bytes": [120], "top_logprobs": [
            {"token": "z", "logprob": -0.25, "bytes": [122]}, {"token": "x", "logprob": -1.0, "bytes": [120]}]})
    );
    let completion = server.ask(COMPLETIONS, json!({"prompt": "a", "logprobs": 1})).await;
    let lists = &completion["choices"][0]["logprobs"];
    assert_eq!(lists["text_offset"], json!([0, 1, 2]));
    assert_eq!(lists["tokens"][2], "x");
    assert_eq!(lists["token_logprobs"], json!([-0.5, -9999.0, -1.0]));
    assert_eq!(lists["top_logprobs"][2], json!({"z": -0.25, "x": -1.0}));
}

#[tokio::test]
async fn min_tokens_defers_stop_strings() {
    let script = |_: &kvern::request::Request| {
        let mut events: Vec<TokenEvent> = "a.b.c".bytes().map(|byte| token(u32::from(byte))).collect();
        events.push(finished(FinishReason::Stop, 4));
        events
    };
    let server = Setup { script: Some(Box::new(script)), ..Setup::default() }.start().await;
    let answer = server.ask(COMPLETIONS, json!({"prompt": "p", "stop": ".", "min_tokens": 2})).await;
    assert_eq!(answer["choices"][0]["text"], "a.b");
    assert_eq!(answer["choices"][0]["stop_reason"], ".");
    assert_eq!(answer["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn models_tokens_and_text() {
    let server = Setup::saying("x").start().await;
    let models: Value = server.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["object"], "list");
    let card = json!({"id": "org/tiny", "object": "model", "created": 1_700_000_000, "owned_by": "kvern",
        "root": "models/tiny", "parent": null, "max_model_len": CONTEXT});
    assert_eq!(models["data"][1], card);
    assert_eq!(server.get("/v1/models/org/tiny").await.json::<Value>().await.unwrap(), card);
    let tokens = server.ask("/tokenize", json!({"prompt": "hé", "return_token_strs": true})).await;
    assert_eq!(
        tokens,
        json!({"count": 3, "max_model_len": CONTEXT, "tokens": [104, 195, 169], "token_strs": ["h", "\u{fffd}", "\u{fffd}"]})
    );
    let text = server.ask("/detokenize", json!({"tokens": [104, 195, 169]})).await;
    assert_eq!(text, json!({"prompt": "hé"}));
    let messages = json!([{"role": "user", "content": "hi"}]);
    let chat = server.ask("/tokenize", json!({"messages": messages, "add_generation_prompt": false})).await;
    assert_eq!(chat["count"], "user\nhi\n".len() + 2);
}
