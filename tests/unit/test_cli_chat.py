"""`tunepool chat`: what it asks for each line, and how the answers stand beside each other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from openai import NotFoundError, OpenAI
from tunepool import chatting, main
from typer.testing import CliRunner

NAME = "ft:tiny:acme::1"


def served(asked: list[dict[str, Any]]) -> OpenAI:
    """A client whose server says which voice answers, and how many messages it has been told."""

    def answer(request: httpx2.Request) -> httpx2.Response:
        if "/v1/models/" in request.url.path:
            there = not request.url.path.endswith("/nobody")
            model = {"id": "m", "object": "model", "created": 1, "owned_by": "o"}
            lost = {"error": {"message": "The model 'nobody' is not there.", "code": "model_not_found"}}
            return httpx2.Response(200, json=model) if there else httpx2.Response(404, json=lost)
        if request.method == "GET":
            known = request.url.path.endswith(NAME)
            return httpx2.Response(200, json={"base_model": "tiny"}) if known else httpx2.Response(404, json={})
        body = json.loads(request.content)
        asked.append(body)
        voice = "off" if body.get("tunepool", {}).get("disabled") else body["model"]
        lines = [{"role": "assistant"}, {"content": f"{voice}/"}, {"content": str(len(body["messages"]))}]
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in lines]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})

    transport = httpx2.Client(transport=httpx2.MockTransport(answer))
    return OpenAI(base_url="http://server/v1", api_key="tp_x", http_client=transport)


def said(monkeypatch: pytest.MonkeyPatch, *words: str, questions: str) -> tuple[str, list[dict[str, Any]]]:
    asked: list[dict[str, Any]] = []
    client = served(asked)
    monkeypatch.setattr(main, "find_credentials", lambda *_, **__: Found(client))
    done = CliRunner().invoke(main.cli, [*words], input=questions)
    assert done.exit_code == 0, done.output
    return done.output, asked


@dataclass
class Found:
    """Credentials whose client is ours."""

    ours: OpenAI

    def client(self) -> OpenAI:
        return self.ours


def test_each_line_is_a_question_and_the_conversation_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = said(monkeypatch, "chat", "tiny", "--temperature", "0", "--system", "Be short.", questions="a\n\nb\n")

    assert out.split() == ["tiny/2", "tiny/4"]
    assert [message["role"] for message in asked[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert asked[1]["messages"][2]["content"] == "tiny/2"
    assert asked[0]["temperature"] == 0


@pytest.mark.parametrize("words", [("nobody",), ("tiny", "--against", "nobody")])
def test_a_model_that_is_not_there_is_told_before_the_first_question(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    asked: list[dict[str, Any]] = []
    client = served(asked)
    monkeypatch.setattr(main, "find_credentials", lambda *_, **__: Found(client))

    done = CliRunner().invoke(main.cli, ["chat", *words], input="")

    assert isinstance(done.exception, NotFoundError)
    assert asked == []


def test_against_its_own_base_an_adapter_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = said(monkeypatch, "chat", NAME, "--against", "tiny", questions="a\n")

    assert [body["model"] for body in asked] == [NAME, NAME]
    assert asked[1]["tunepool"] == {"disabled": True}
    assert f"{NAME}/1" in out
    assert "off/1" in out
    assert "tiny (adapter off)" in out


def test_against_another_model_both_are_asked_and_json_has_a_line_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = said(monkeypatch, "--json", "chat", "tiny", "--against", "other", questions="a\n")

    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["content"] for answer in answers] == ["tiny/1", "other/1"]


def test_an_answer_gives_no_orders_to_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    voice = chatting.ChatSide("t", "t", disabled=False)
    monkeypatch.setattr(voice, "ask", lambda *_, **__: iter([setattr(voice, "answer", "\x1b[2Jhi")]))

    chatting._speak(served([]), voice, "a", {})

    assert capsys.readouterr().out == "\ufffd[2Jhi\n"
