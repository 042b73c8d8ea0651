//! Chat templates against transformers; `scripts/make_template_reference.py` wrote the expected prompts.
#![allow(clippy::unwrap_used)]

use super::{ChatTemplate, RenderInput, TemplateError};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/templates")
}

fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
    ChatTemplate::new(&[("default".into(), source.into())], Map::new())
}

/// A template without messages, for what does not depend on them.
fn render(source: &str) -> Result<String, TemplateError> {
    template(source)?.render(&RenderInput::new(&json!([])))
}

fn input(case: &Value) -> RenderInput<'_> {
    let flag = |name| case.get(name).and_then(Value::as_bool).unwrap_or(false);
    RenderInput {
        messages: &case["messages"],
        tools: case.get("tools"),
        documents: None,
        add_generation_prompt: flag("add_generation_prompt"),
        continue_final_message: flag("continue_final_message"),
        kwargs: case.get("kwargs").and_then(Value::as_object),
    }
}

/// Clients send the arguments of tool calls as JSON text; transformers was given objects.
fn as_clients_send(case: &Value) -> Value {
    let mut case = case.clone();
    for message in case["messages"].as_array_mut().unwrap() {
        for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
            let arguments = &mut call["function"]["arguments"];
            *arguments = arguments.to_string().into();
        }
    }
    case
}

/// Both sides from where they part.
fn describe(place: &str, found: &Result<String, TemplateError>, wanted: &Value) -> String {
    match (found, wanted.get("prompt").and_then(Value::as_str)) {
        (Ok(found), Some(wanted)) => {
            let same = found.chars().zip(wanted.chars()).take_while(|(left, right)| left == right).count();
            let rest = |text: &str| text.chars().skip(same.saturating_sub(20)).take(80).collect::<String>();
            format!("{place}: found {:?}, expected {:?}", rest(found), rest(wanted))
        }
        _ => format!("{place}: found {found:?}, expected {wanted}"),
    }
}

/// Renders every case with every template of the folder; returns what differs.
fn differences(folder: &Path, expected: &Value) -> Vec<String> {
    let special_tokens = expected["special_tokens"].as_object().unwrap();
    let mut differences = Vec::new();
    for (name, prompts) in expected["expected"].as_object().unwrap() {
        let source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let template = match ChatTemplate::new(&[("default".into(), source)], special_tokens.clone()) {
            Ok(template) => template,
            Err(error) => {
                differences.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (case, wanted) in prompts.as_object().unwrap() {
            let sent = as_clients_send(&expected["cases"][case]);
            let found = template.render(&input(&sent));
            let same = match (&found, wanted.get("prompt").and_then(Value::as_str)) {
                (Ok(found), Some(wanted)) => found == wanted,
                (Err(TemplateError::Rejected(_)), None) => true,
                _ => false,
            };
            if !same {
                differences.push(describe(&format!("{name}, {case}"), &found, wanted));
            }
        }
    }
    differences
}

#[test]
fn templates_render_as_in_transformers() {
    let expected: Value = serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap();
    assert_eq!(expected["expected"].as_object().unwrap().len(), 7);
    assert_eq!(differences(&folder(), &expected), Vec::<String>::new());
}

#[test]
fn errors_say_whose_fault_it_is() {
    let broken = |source: &str| match render(source) {
        Err(TemplateError::Broken(message)) => message,
        other => panic!("{source}: {other:?}"),
    };
    let rejected = |source: &str| match render(source) {
        Err(TemplateError::Rejected(message)) => message,
        other => panic!("{source}: {other:?}"),
    };
    assert!(broken("{% if %}").contains("syntax error"));
    assert!(broken("{{ x | nofilter }}").contains("nofilter"));
    assert!(broken("{{ nofunction() }}").contains("nofunction"));
    assert_eq!(rejected("{{ raise_exception('no tools here') }}"), "no tools here");
    let in_macro = "{% macro m() %}{{ raise_exception('inside') }}{% endmacro %}{{ m() }}";
    assert_eq!(rejected(in_macro), "inside");
    rejected("{{ messages[0].content.text }}");
    rejected("{{ strftime_now('%Q') }}");
}

#[test]
fn messages_of_a_wrong_shape_are_rejected() {
    let template = template("{% for m in messages %}{{ m.content }}{% endfor %}").unwrap();
    let bad_arguments = json!([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]);
    let cases = [
        (json!({}), "expected a list of messages, found an object"),
        (json!(["text"]), "messages[0]: expected an object, found a string"),
        (bad_arguments, "messages[0].tool_calls[0].function.arguments: expected JSON text"),
    ];
    for (messages, expected) in cases {
        let error = template.render(&RenderInput::new(&messages)).unwrap_err();
        assert!(matches!(&error, TemplateError::Rejected(message) if message.contains(expected)), "{error}");
    }
    let messages = json!([{"role": "user", "content": "a"}]);
    let both = RenderInput { continue_final_message: true, ..RenderInput::new(&messages) };
    assert!(template.render(&both).unwrap_err().to_string().contains("found both"));
    let nothing = json!([{"role": "assistant", "content": null}]);
    let continued =
        RenderInput { continue_final_message: true, add_generation_prompt: false, ..RenderInput::new(&nothing) };
    assert!(template.render(&continued).unwrap_err().to_string().contains("no content to continue"));
}

#[test]
fn content_is_given_as_the_template_takes_it() {
    let text = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let parts = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
    let both = "{% for m in messages %}{% if m.content is string %}[{{ m.content }}]{% else %}\
                {% for p in m.content %}<{{ p.text }}>{% endfor %}{% endif %}{% endfor %}";
    let as_text = json!([{"role": "user", "content": "a"}]);
    let as_parts = json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]);
    let cases = [
        (text, &as_text, "[a]"),
        (text, &as_parts, "[a\nb]"),
        (parts, &as_text, "[a]"),
        (parts, &as_parts, "[a][b]"),
        (both, &as_text, "[a]"),
        (both, &as_parts, "<a><b>"),
    ];
    for (source, messages, expected) in cases {
        let template = template(source).unwrap();
        assert_eq!(template.render(&RenderInput::new(messages)).unwrap(), expected, "{source}");
    }
}

#[test]
fn a_tool_template_is_used_with_tools_only() {
    let named = |name: &str| (name.to_string(), format!("{name} {{{{ x }}}}"));
    let messages = json!([]);
    let tools = json!([]);
    let kwargs = json!({"x": 1, "messages": "ignored"});
    let plain = RenderInput { kwargs: kwargs.as_object(), ..RenderInput::new(&messages) };
    let with_tools = RenderInput { tools: Some(&tools), ..plain };
    let both = ChatTemplate::new(&[named("default"), named("tool_use")], Map::new()).unwrap();
    assert_eq!(both.render(&plain).unwrap(), "default 1");
    assert_eq!(both.render(&with_tools).unwrap(), "tool_use 1");
    let only = ChatTemplate::new(&[named("rag")], Map::new()).unwrap();
    assert_eq!(only.render(&with_tools).unwrap(), "rag 1");
    let error = ChatTemplate::new(&[named("rag"), named("tool_use")], Map::new()).unwrap_err();
    assert!(matches!(error, TemplateError::Broken(message) if message.contains("named default")));
}

#[test]
fn hostile_templates_are_bounded() {
    let start = Instant::now();
    let hundred = "{% for i in range(10000) %}";
    let loops = format!("{}{}", hundred.repeat(4), "{% endfor %}".repeat(4));
    assert!(matches!(render(&loops), Err(TemplateError::Rejected(message)) if message.contains("steps")));
    let long = "{% for i in range(10000) %}{{ 'x' * 100000 }}{% endfor %}";
    assert!(matches!(render(long), Err(TemplateError::Rejected(message)) if message.contains("longer than")));
    let recursive = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}";
    assert!(render(recursive).is_err());
    let nested = format!("{{{{ {}1{} }}}}", "(".repeat(10_000), ")".repeat(10_000));
    assert!(render(&nested).is_err());
    let open_tags = "{%".repeat(100_000);
    assert!(render(&open_tags).is_err());
    assert!(start.elapsed() < Duration::from_secs(20), "took {:?}", start.elapsed());
}

#[test]
fn generation_tags_are_scopes() {
    assert_eq!(render("a\n{% generation %}\nb{% endgeneration %}\nc").unwrap(), "a\nbc");
    assert_eq!(render("a\n{%- generation -%}\n b {%- endgeneration %} c").unwrap(), "ab c");
    assert!(render("{% generation %}").is_err());
}

#[test]
fn the_time_is_printed_as_python_does() {
    let date = render("{{ strftime_now('%Y-%m-%d|%d %b %Y|%f') }}").unwrap();
    let fields: Vec<&str> = date.split('|').collect();
    assert_eq!((fields[0].len(), fields[1].len(), fields[2].len()), (10, 11, 6), "{date}");
}

/// Pieces of templates, most of them meaningless together.
fn template_source() -> impl Strategy<Value = String> {
    let pieces = [
        "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ messages }}", "{% if m.role == 'user' %}",
        "{% else %}", "{% endif %}", "{{ messages | tojson(indent=2) }}", "{% set x = messages[0] %}", "{{ x['content'] }}",
        "{{ x.content.split('a')[1:] }}", "{{ x.content[::-1] }}", "{{ x.content | upper | trim }}", "{% generation %}",
        "{% endgeneration %}", "{{ raise_exception(x.role) }}", "{{ 'a' * 1000 }}", "{{ range(99999999) | list }}",
        "{% macro f(a) %}", "{% endmacro %}", "{{ f(f) }}", "{{ loop.index / 0 }}", "{% break %}", "{# c #}", "{{- 1 // 0 }}",
        "{{ tools | length }}", "{% set ns = namespace(a=1) %}", "{% set ns.a = ns.a * 9999999 %}", "text\n  ", "{%", "}}", "é😀",
        "{{ x.content.rsplit(none, 1) }}", "{{ x.content.index('a') }}", "{{ x.content.rpartition('') }}", "{{ x }}",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()), 0..12).prop_map(|pieces| pieces.concat())
}

fn message() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-c<é\n ]{0,8}".prop_map(Value::from),
    ];
    let key = prop::sample::select(vec!["role", "content", "tool_calls", "function", "arguments", "text", "thinking"]);
    leaf.prop_recursive(3, 16, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().map(|(key, value)| (key.to_string(), value)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn no_template_or_message_panics_or_grows(
        source in template_source(),
        messages in prop::collection::vec(message(), 0..4),
        continue_final_message in any::<bool>(),
    ) {
        let messages = Value::from(messages);
        if let Ok(template) = template(&source) {
            let input = RenderInput {
                tools: Some(&messages),
                add_generation_prompt: !continue_final_message,
                continue_final_message,
                ..RenderInput::new(&messages)
            };
            if let Ok(prompt) = template.render(&input) {
                prop_assert!(prompt.len() < 1 << 20);
            }
        }
    }

    /// The committed templates take anything that a client may send.
    #[test]
    fn real_templates_take_any_messages(
        name in prop::sample::select(vec!["smollm2", "qwen3", "qwen2.5", "mistral-nemo", "llama-style"]),
        messages in prop::collection::vec(message(), 0..4),
    ) {
        let source = std::fs::read_to_string(folder().join(format!("{name}.jinja"))).unwrap();
        let messages = Value::from(messages);
        let rendered = template(&source).unwrap().render(&RenderInput::new(&messages));
        prop_assert!(!matches!(rendered, Err(TemplateError::Broken(_))), "{:?}", rendered);
    }
}
