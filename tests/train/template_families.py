"""Chat templates of thirty-six families with the control tokens that they write, on a tokenizer of bytes.

The templates are those that the models were published with, as TRL keeps them; the ones that it does not have are
written here from the models' documented formats.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Final, NamedTuple

import trl
from tokenizers import AddedToken

from tests.train.later_templates import LATER
from tests.train.tiny import make_tokenizer

# Mistral 7B v0.3: the system text before the last question only, calls with ids of nine characters.
MISTRAL_V3: Final = """\
{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}\
{%- set loop_messages = messages[1:] %}\
{%- else %}{%- set loop_messages = messages %}{%- endif %}\
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}\
{{- bos_token }}{%- for message in loop_messages %}\
{%- if message["role"] == "user" %}\
{%- if tools is not none and tools is defined and (message == user_messages[-1]) %}\
{{- "[AVAILABLE_TOOLS] " + tools | map(attribute="function") | list | tojson + "[/AVAILABLE_TOOLS]" }}{%- endif %}\
{%- if loop.last and system_message is defined %}\
{{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}\
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}\
{%- elif message.tool_calls is defined and message.tool_calls %}{{- "[TOOL_CALLS] [" }}\
{%- for tool_call in message.tool_calls %}{%- set out = tool_call.function | tojson %}{{- out[:-1] }}\
{%- if not tool_call.id is defined or tool_call.id | length != 9 %}\
{{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}{%- endif %}\
{{- ', "id": "' + tool_call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}\
{%- endfor %}\
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}\
{%- elif message["role"] == "tool" %}\
{{- '[TOOL_RESULTS] {"content": ' + message.content | string }}{{- ', "call_id": "' + message.tool_call_id }}\
{{- '"}[/TOOL_RESULTS]' }}\
{%- else %}{{- raise_exception("Only user and assistant roles are supported") }}{%- endif %}{%- endfor %}"""
LLAMA2: Final = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + "
    "'\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SMOLLM2: Final = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
ZEPHYR: Final = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI4: Final = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
GRANITE: Final = (
    "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] "
    "+ '<|end_of_text|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
OLMO2: Final = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\\n' + "
    "message['content'] + '\\n' }}{% elif message['role'] == 'user' %}{{ '<|user|>\\n' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{% if not loop.last %}{{ '<|assistant|>\\n' + message['content'] + "
    "eos_token + '\\n' }}{% else %}{{ '<|assistant|>\\n' + message['content'] + eos_token }}{% endif %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"
)
VICUNA: Final = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_OWN: Final = {
    "mistral_v3": MISTRAL_V3,
    "llama2": LLAMA2,
    "smollm2": SMOLLM2,
    "zephyr": ZEPHYR,
    "phi4": PHI4,
    "granite3": GRANITE,
    "olmo2": OLMO2,
    "vicuna": VICUNA,
    **LATER,
}


class TemplateFamily(NamedTuple):
    """A template, its tokenizer's begin and end, and its other tokens: special ones, and tags that are text to it."""

    template: str
    bos: str
    eos: str
    special: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


_CHATML: Final = ("<|im_start|>",)
_QWEN_TAGS: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_LLAMA3: Final = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
_DEEPSEEK: Final = (
    "<｜User｜>",
    "<｜Assistant｜>",
    *(f"<｜tool▁{part}▁{end}｜>" for part in ("calls", "call", "outputs", "output") for end in ("begin", "end")),
    "<｜tool▁sep｜>",
)
_COHERE: Final = (
    "<|START_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
)
_TEKKEN: Final = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
_KIMI: Final = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "[EOS]")
_KIMI_TAGS: Final = (
    *("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
)
_GEMMA4: Final = (
    *("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
    *("<|tool_response>", "<tool_response|>", '<|"|>'),
)
FAMILIES_OF_TEMPLATES: Final = {
    "qwen2_5": TemplateFamily("qwen2_5", "", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "qwen3": TemplateFamily("qwen3", "", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "qwen3_2507": TemplateFamily("qwen3_instruct_2507", "", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "qwen3_5": TemplateFamily("qwen3_5_think", "", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "smollm2": TemplateFamily("smollm2", "<|im_start|>", "<|im_end|>"),
    "llama2": TemplateFamily("llama2", "<s>", "</s>", ("<unk>",)),
    "llama3": TemplateFamily("llama3", "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "llama3_1": TemplateFamily("llama3_1", "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "llama3_2": TemplateFamily("llama3_2", "<|begin_of_text|>", "<|eot_id|>", _LLAMA3),
    "gemma2": TemplateFamily("gemma", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "gemma3": TemplateFamily("gemma3", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>")),
    "mistral_v3": TemplateFamily(
        "mistral_v3",
        "<s>",
        "</s>",
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
    ),
    "phi3": TemplateFamily("phi3", "<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
    "phi4": TemplateFamily("phi4", "<|endoftext|>", "<|im_end|>", ("<|im_start|>", "<|im_sep|>")),
    "deepseek_v3": TemplateFamily("deepseekv3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK),
    "deepseek_r1": TemplateFamily(
        "deepseek_r1_distill", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK, ("<think>", "</think>")
    ),
    "gpt_oss": TemplateFamily(
        "gptoss",
        "<|startoftext|>",
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|constrain|>"),
    ),
    "glm4_moe": TemplateFamily(
        "glm4moe",
        "",
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<think>", "</think>", "<tool_call>", "</tool_call>", "/nothink"),
    ),
    "cohere": TemplateFamily("cohere", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", _COHERE),
    "lfm2": TemplateFamily("lfm2_2_5_v2", "<|startoftext|>", "<|im_end|>", _CHATML, ("<think>", "</think>")),
    "nemotron_3": TemplateFamily("nemotron_3_nano", "<s>", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "granite3": TemplateFamily(
        "granite3", "<|end_of_text|>", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>")
    ),
    "olmo2": TemplateFamily("olmo2", "<|endoftext|>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>")),
    "zephyr": TemplateFamily("zephyr", "<s>", "</s>", ("<unk>",)),
    "vicuna": TemplateFamily("vicuna", "<s>", "</s>", ("<unk>",)),
    "devstral": TemplateFamily("devstral", "<s>", "</s>", _TEKKEN),
    "command_r7b": TemplateFamily(
        "command_r7b",
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        (*_COHERE, "<|START_ACTION|>", "<|END_ACTION|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
    ),
    "phi4_mini": TemplateFamily(
        "phi4_mini",
        "",
        "<|endoftext|>",
        (
            *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>", "<|/tool|>"),
            *("<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"),
        ),
    ),
    "hermes_3": TemplateFamily("hermes_3", "<|begin_of_text|>", "<|im_end|>", _CHATML, _QWEN_TAGS),
    "deepseek_v31": TemplateFamily(
        "deepseek_v31", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", _DEEPSEEK, ("<think>", "</think>")
    ),
    "granite_4": TemplateFamily(
        "granite_4", "", "<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>"), _QWEN_TAGS[2:]
    ),
    "exaone_4": TemplateFamily(
        "exaone_4", "", "[|endofturn|]", ("[|user|]", "[|assistant|]", "[|system|]", "[|tool|]"), _QWEN_TAGS
    ),
    "minimax_m2": TemplateFamily("minimax_m2", "", "[e~[", ("]~!b[", "]~b]"), ("<think>", "</think>")),
    "kimi_k2": TemplateFamily("kimi_k2", "", "<|im_end|>", _KIMI, _KIMI_TAGS),
    "kimi_k2_first": TemplateFamily("kimi_k2_first", "", "<|im_end|>", _KIMI, _KIMI_TAGS),
    "gemma4": TemplateFamily("gemma4", "<bos>", "<eos>", _GEMMA4),
    "diffusion_gemma": TemplateFamily("diffusion_gemma", "<bos>", "<eos>", _GEMMA4),
}


@functools.cache
def family_tokenizer(name: str) -> Any:
    """One token per byte, and the family's own tokens."""
    family = FAMILIES_OF_TEMPLATES[name]
    template = _OWN.get(family.template)
    if template is None:
        folder = Path(trl.__file__).parent / "chat_templates"
        template = (folder / f"{family.template}.jinja").read_text(encoding="utf-8")
    tokenizer = make_tokenizer(template)
    named = {"bos_token": family.bos or None, "eos_token": family.eos, "pad_token": family.eos}
    tokenizer.add_special_tokens({key: token for key, token in named.items() if token})
    if not family.bos:
        tokenizer.bos_token = None
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=True) for one in family.special])
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=False) for one in family.tags])
    return tokenizer
