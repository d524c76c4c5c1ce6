"""One rendering that counts messages finds what rendering every prefix finds, and is done for no other template."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import Invalid
from tests.train.test_loss_mask import FORGETFUL, WITH_MARKERS, WITHOUT_MARKERS
from tests.train.tiny import CHATML, make_tokenizer
from worker.train import chat as chat_module
from worker.train.chat import ChatTemplate, Rendered
from worker.train.one_rendering import MARK, with_marks

SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'tool' %}
    {{- raise_exception('no') }}
{%- endif %}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set role = 'model' -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif %}
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name ~ (', ' if not loop.last else '') }}
    {%- endfor %}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\n' }}
{%- endif -%}
"""
TURNS = """\
{% set state = namespace(turn=0) %}
{% for tool in tools or [] %}{{ tool.function.name }}{{ '' if loop.last else ' ' }}{% endfor %}
{# {% endfor %} #}{{ '{% endfor %}' }}{% raw %}{% endfor %}{% endraw %}
{% for m in messages %}
   {% set state.turn = state.turn + (1 if m.role == 'user' else 0) %}
   [{{ state.turn }}{{ loop.previtem.role if loop.index > 1 }}] {{ m.role }}: {{ m.content }}
   {%+ endfor %}
{%- if add_generation_prompt and not thinking is defined %}[assistant]: {% endif %}"""
THINKING = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
INCREMENTAL = {
    "chatml": CHATML,
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "turns": TURNS,
    "thinking": THINKING,
    "no header": PLAIN,
}

LOOP = "{% for m in messages %}{{ m.role }}>{{ m.content }}\n"
HEADER = "{% if add_generation_prompt %}assistant>{% endif %}"
OTHERS = {
    "forgetful": FORGETFUL,
    "with markers": WITH_MARKERS,
    "without markers": WITHOUT_MARKERS,
    "last": LOOP + "{% if loop.last %}!{% endif %}{% endfor %}" + HEADER,
    "item of loop": LOOP + "{{ loop['last'] }}{% endfor %}" + HEADER,
    "filtered loop": LOOP + "{{ loop | attr('length') }}{% endfor %}" + HEADER,
    "next": LOOP + "{{ loop.nextitem.role if loop.nextitem }}{% endfor %}" + HEADER,
    "last message": LOOP + "{{ messages[-1].role }}{% endfor %}" + HEADER,
    "second message": "{{ messages[1].role }}" + LOOP + "{% endfor %}" + HEADER,
    "count": "{{ messages | length }}" + LOOP + "{% endfor %}" + HEADER,
    "all": "{{ messages }}" + LOOP + "{% endfor %}" + HEADER,
    "kept in a namespace": "{% set n = namespace(all=messages) %}" + LOOP + "{{ n.all[-1].role }}{% endfor %}" + HEADER,
    "asks within": LOOP + "{% if add_generation_prompt %}?{% endif %}{% endfor %}" + HEADER,
    "asks before": "{{ add_generation_prompt }}" + LOOP + "{% endfor %}" + HEADER,
    "header by row": LOOP + "{% endfor %}{% if add_generation_prompt %}{{ tools }}{% endif %}",
    "header by last": LOOP + "{% endfor %}{% if messages[-1].role == 'user' and add_generation_prompt %}a>{% endif %}",
    "header by count": "{% set n = namespace(i=0) %}" + LOOP + "{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}" + HEADER,
    "renamed": "{% set m = messages %}{% set m = m[1:] %}{% for x in m %}{{ x.content }}{% endfor %}" + HEADER,
    "slice": "{% for m in messages[1:] %}{{ m.content }}{% endfor %}" + HEADER,
    "reversed": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}" + HEADER,
    "some": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}" + HEADER,
    "else": LOOP + "{% else %}none{% endfor %}" + HEADER,
    "skips": LOOP + "{% if m.role == 'system' %}{% continue %}{% endif %}{% endfor %}" + HEADER,
    "stops": LOOP + "{% if m.role == 'user' %}{% break %}{% endif %}{% endfor %}" + HEADER,
    "twice": LOOP + "{% endfor %}" + LOOP + "{% endfor %}" + HEADER,
    "nested": LOOP + "{% for n in messages %}{{ n.role }}{% endfor %}{% endfor %}" + HEADER,
    "captured": "{% set text %}" + LOOP + "{% endfor %}{% endset %}{{ text | upper }}" + HEADER,
    "macro": "{% macro end() %}{{ messages | length }}{% endmacro %}" + LOOP + "{{ end() }}{% endfor %}" + HEADER,
    "chance": LOOP + "{{ [1, 2, 3] | random }}{% endfor %}" + HEADER,
    "chance by name": LOOP + "{{ [[1, 2], [3]] | map('random') | list }}{% endfor %}" + HEADER,
    "words": LOOP + "{{ lipsum() }}{% endfor %}" + HEADER,
    "broken": "{% for m in messages %}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}" + LOOP + "{% endfor %}",
}

WORDS = ["", "a", " b ", "two\nlines\n", "<|im_end|>", "<|im_end|>\n", "ünïcödé 🙂", "assistant", "<think>", MARK, "\t"]


def found(template: ChatTemplate, messages: list[dict[str, Any]]) -> Rendered | str:
    try:
        return template.render_with_spans(messages, tools=None)
    except Invalid as error:
        return error.code


@pytest.mark.parametrize("name", INCREMENTAL)
def test_counting_messages_finds_what_rendering_every_prefix_finds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = ChatTemplate(make_tokenizer(INCREMENTAL[name]))
    assert counting._counting_template is not None
    monkeypatch.setattr(chat_module, "with_marks", lambda _: None)
    by_prefix = ChatTemplate(make_tokenizer(INCREMENTAL[name]))
    assert by_prefix._counting_template is None

    @given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.sampled_from(WORDS)), min_size=1))
    def compare(turns: list[tuple[str, str]]) -> None:
        messages = [{"role": role, "content": content} for role, content in turns]
        assert found(counting, messages) == found(by_prefix, messages)

    compare()


@pytest.mark.parametrize("name", INCREMENTAL)
def test_an_ordinary_conversation_is_counted_by_one_rendering(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(make_tokenizer(INCREMENTAL[name]))
    messages = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user", "assistant")]
    template.render_with_spans(messages, tools=None)  # learns the header
    renderings = itertools.count()
    render = template._render
    monkeypatch.setattr(template, "_render", lambda *a, **k: (next(renderings), render(*a, **k))[1])

    assert len(template.render_with_spans(messages, tools=None).spans) == 2
    assert next(renderings) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_a_template_that_may_look_ahead_is_not_counted(name: str) -> None:
    assert with_marks(OTHERS[name]) is None
