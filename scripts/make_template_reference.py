"""Makes tests/data/templates/expected.json: what transformers renders for each template there and each conversation below.

    pip install transformers==5.23.0 jinja2==3.1.6
    python scripts/make_template_reference.py

The templates smollm2, qwen2.5, qwen3, qwq and mistral-nemo are those of the models (Apache-2.0);
llama-style and features were written for Kvern.
"""

import copy
import json
import pathlib
import sys

from transformers.utils.chat_template_utils import render_jinja_template

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "templates"
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

USER = {"role": "user", "content": "What's the weather in Zürich? <b>&'\"\\</b> 天气"}
SYSTEM = {"role": "system", "content": "You are helpful.\n  Answer briefly. "}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city: \"now\" <or> later & 'soon'",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Stadt, z. B. Zürich"},
                    "days": {"type": "integer", "default": 3, "enum": [1, 2.0, 1e-07]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "noop", "description": "", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2, "x": [None, True, 0.5]}}}],
}
ANSWER = {"role": "tool", "tool_call_id": "call12345", "name": "get_weather", "content": "{\"temp\": -3.5}"}
THOUGHT = {"role": "assistant", "content": "It is cold.\n", "reasoning_content": "\nLet me think.\n"}

CASES = {
    "user": {"messages": [USER], "add_generation_prompt": True},
    "no generation prompt": {"messages": [USER]},
    "system": {"messages": [SYSTEM, USER], "add_generation_prompt": True},
    "turns": {"messages": [SYSTEM, USER, {"role": "assistant", "content": " Cold. "}, {"role": "user", "content": "Why?\n\n"}], "add_generation_prompt": True},
    "empty content": {"messages": [{"role": "user", "content": ""}], "add_generation_prompt": True},
    "two users": {"messages": [USER, USER], "add_generation_prompt": True},
    "assistant first": {"messages": [THOUGHT, USER], "add_generation_prompt": True},
    "tools": {"messages": [SYSTEM, USER], "tools": TOOLS, "add_generation_prompt": True},
    "tools without system": {"messages": [USER], "tools": TOOLS, "add_generation_prompt": True},
    "tool call": {"messages": [USER, CALL, ANSWER], "tools": TOOLS, "add_generation_prompt": True},
    "tool call, two answers": {"messages": [SYSTEM, USER, CALL, ANSWER, ANSWER, {"role": "assistant", "content": "-3.5 °C"}, USER], "tools": TOOLS, "add_generation_prompt": True},
    "reasoning": {"messages": [USER, THOUGHT, USER], "add_generation_prompt": True},
    "reasoning by another name": {"messages": [USER, {"role": "assistant", "content": "a", "thinking": "b"}]},
    "thinking off": {"messages": [SYSTEM, USER], "add_generation_prompt": True, "kwargs": {"enable_thinking": False}},
    "thinking on": {"messages": [USER], "add_generation_prompt": True, "kwargs": {"enable_thinking": True}},
    "date": {"messages": [USER], "add_generation_prompt": True, "kwargs": {"date_string": "01 Jan 2026"}},
    "continue": {"messages": [USER, {"role": "assistant", "content": "It is"}], "continue_final_message": True},
    "continue with a space": {"messages": [USER, {"role": "assistant", "content": "It is  "}], "continue_final_message": True},
    "think in content": {"messages": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nCold."}, USER], "add_generation_prompt": True},
    "unknown role": {"messages": [USER, {"role": "critic", "content": "no"}], "add_generation_prompt": True},
}


def render(template, case):
    case = copy.deepcopy(case)
    kwargs = {**SPECIAL_TOKENS, **case.pop("kwargs", {})}
    messages = case.pop("messages")
    try:
        rendered, _ = render_jinja_template([messages], chat_template=template, **case, **kwargs)
    except Exception as error:  # Which one does not matter: there must be no prompt.
        return {"error": str(error)}
    return {"prompt": rendered[0]}


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    out = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER / "expected.json"
    results = {}
    for path in sorted(folder.glob("*.jinja")):
        template = path.read_text()
        results[path.stem] = {name: render(template, case) for name, case in CASES.items()}
    text = json.dumps({"special_tokens": SPECIAL_TOKENS, "cases": CASES, "expected": results}, ensure_ascii=False, indent=1)
    out.write_text(text + "\n")


if __name__ == "__main__":
    main()
