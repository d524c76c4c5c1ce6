"""Chat templates of later families, each as short as its documented format allows; written here, not copied.

Sources: the model cards and chat formats of Mistral Small 3.2 and Devstral, Command R7B, Phi-4-mini, Hermes 3,
DeepSeek V3.1, Granite 4, EXAONE 4, MiniMax M2 and Kimi K2.
"""

from __future__ import annotations

from typing import Final

_NEXT_IS_TOOL: Final = "(not loop.last and messages[loop.index0 + 1].role == 'tool')"
_LAST_WAS_TOOL: Final = "(loop.index0 and messages[loop.index0 - 1].role == 'tool')"
_TOOLS: Final = "{% if tools %}START{% for tool in tools %}{{ tool | tojson }}{% endfor %}END{% endif %}"


def _tools(start: str, end: str) -> str:
    return _TOOLS.replace("START", start).replace("END", end)


# Text and calls side by side; calls without ids.
DEVSTRAL: Final = (
    "{{ bos_token }}"
    + _tools("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    + "{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)
# The next answer's header closes each conversation, asked for or not.
COMMAND_R7B: Final = (
    "{{ bos_token }}"
    + _tools("<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>", "<|END_OF_TURN_TOKEN|>")
    + "{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m.role == 'system' %}<|SYSTEM_TOKEN|>{{ m.content }}"
    "{% elif m.role == 'user' %}<|USER_TOKEN|>{{ m.content }}"
    "{% elif m.role == 'tool' %}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[{{ m.content | tojson }}]<|END_TOOL_RESULT|>"
    "{% elif m.tool_calls %}<|CHATBOT_TOKEN|><|START_ACTION|>[\n"
    "{% for call in m.tool_calls %}{{ '    ' }}"
    '{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ call.function.name }}",'
    ' "parameters": {{ call.function.arguments | tojson }}}{% if not loop.last %}{{ ",\\n" }}{% endif %}'
    "{% endfor %}{{ '\\n' }}]<|END_ACTION|>"
    "{% else %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
# A second end closes each conversation, and a look ahead keeps it from being counted.
PHI4_MINI: Final = (
    _tools("<|system|><|tool|>", "<|/tool|><|end|>")
    + "{% for m in messages %}{% if m.role == 'tool' %}<|tool_response|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls %}"
    "<|tool_call|>{{ call.function | tojson }}<|/tool_call|>{% endfor %}<|end|>"
    "{% if loop.last and not add_generation_prompt %}<|endoftext|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The last result of a tool is written otherwise than one that an answer follows; text beside a call is left out.
HERMES_3: Final = (
    "{{ bos_token }}"
    + _tools("<|im_start|>system\n<tools>", "</tools><|im_end|>\n")
    + "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}"
    "{{ '\\n</tool_response>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}<|im_end|>"
    "{% elif m.tool_calls %}<|im_start|>assistant{% for call in m.tool_calls %}{{ '\\n<tool_call>\\n' }}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "{{ '\\n</tool_call>' }}{% endfor %}<|im_end|>{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Without thoughts; arguments as text; no header behind the result of a tool, nor before an answer that comes first.
DEEPSEEK_V31: Final = (
    "{% set ns = namespace(asked=false) %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{{ tools | tojson if tools else '' }}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = true %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% elif m.role == 'assistant' %}{% if ns.asked %}<｜Assistant｜></think>{% endif %}{% set ns.asked = false %}"
    "{{ m.content }}{% if m.tool_calls %}<｜tool▁calls▁begin｜>{% for call in m.tool_calls %}"
    "{{ '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments"
    " + '<｜tool▁call▁end｜>' }}{% endfor %}<｜tool▁calls▁end｜>{% endif %}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt and ns.asked %}<｜Assistant｜></think>{% endif %}"
)
GRANITE_4: Final = (
    _tools("<|start_of_role|>system<|end_of_role|><tools>", "</tools><|end_of_text|>\n")
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    f"{{% if not {_LAST_WAS_TOOL} %}}<|start_of_role|>user<|end_of_role|>{{% endif %}}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    f"{{% if not {_NEXT_IS_TOOL} %}}{{{{ '<|end_of_text|>\\n' }}}}{{% endif %}}"
    "{% else %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}{% for call in m.tool_calls %}"
    "{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|end_of_text|>\\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
# An empty thought is part of the header, in what is stored as in what is asked.
EXAONE_4: Final = (
    _tools("[|system|]\n", "[|endofturn|]\n")
    + "{% for m in messages %}{{ '[|' + m.role + '|]\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\\n\\n</think>\\n\\n' + m.content }}{% for call in m.tool_calls %}"
    "{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}{% elif m.role == 'tool' %}<tool_result>{{ m.content | tojson }}</tool_result>"
    "{% else %}{{ m.content }}{% endif %}{{ '[|endofturn|]\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
# A question opens a thought; thoughts before the last question are left out.
MINIMAX_M2: Final = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{{ ']~!b[' }}"
    + _tools("]~b]system\n<tools>", "</tools>[e~[\n")
    + "{% for m in messages %}{% if m.role == 'assistant' %}{{ ']~b]ai\\n' }}"
    "{% if m.reasoning_content and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}"
    "{% if m.tool_calls %}{{ '\\n<minimax:tool_call>\\n' }}{% for call in m.tool_calls %}"
    "{{ '<invoke name=\"' + call.function.name + '\">\\n' }}{% for key, value in call.function.arguments.items() %}"
    "{{ '<parameter name=\"' + key + '\">' }}{{ value if value is string else value | tojson }}"
    "{{ '</parameter>\\n' }}{% endfor %}{{ '</invoke>\\n' }}{% endfor %}</minimax:tool_call>{% endif %}"
    "{% elif m.role == 'tool' %}{{ ']~b]tool\\n<response>' + m.content + '</response>' }}"
    "{% else %}{{ ']~b]' + m.role + '\\n' + m.content }}{% endif %}{{ '[e~[\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ']~b]ai\\n<think>\\n' }}{% endif %}"
)
# A call's id stands for its name too; a result names the id.
KIMI_K2: Final = (
    _tools("<|im_system|>tool_declare<|im_middle|>", "<|im_end|>")
    + "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>{% endif %}"
    "{% if m.role == 'system' %}<|im_system|>system<|im_middle|>{% elif m.role == 'user' %}<|im_user|>user<|im_middle|>"
    "{% elif m.role == 'assistant' %}<|im_assistant|>assistant<|im_middle|>"
    "{% elif m.role == 'tool' %}<|im_system|>tool<|im_middle|>## Return of {{ m.tool_call_id + '\n' }}{% endif %}"
    "{{ m.content or '' }}{% if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}"
    "<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}"
    "<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
# As it was first published: ids of calls are made here, ids of results are not.
KIMI_K2_FIRST: Final = KIMI_K2.replace("{{ call.id }}", "functions.{{ call.function.name }}:{{ loop.index0 }}")
LATER: Final = {
    "devstral": DEVSTRAL,
    "command_r7b": COMMAND_R7B,
    "phi4_mini": PHI4_MINI,
    "hermes_3": HERMES_3,
    "deepseek_v31": DEEPSEEK_V31,
    "granite_4": GRANITE_4,
    "exaone_4": EXAONE_4,
    "minimax_m2": MINIMAX_M2,
    "kimi_k2": KIMI_K2,
    "kimi_k2_first": KIMI_K2_FIRST,
}
