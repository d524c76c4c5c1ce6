"""`tunepool logs`: follows attempt after attempt to the end, outlasts a restart of the server, acts on no terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from openai import APIConnectionError, NotFoundError, OpenAI
from tunepool import logs, main
from typer.testing import CliRunner

REQUEST = httpx2.Request("GET", "http://server/v1")


def part(text: str, *, start: int = 0, attempt: int = 1, size: int | None = None, **more: Any) -> dict[str, Any]:
    end = start + len(text)
    return {
        "attempt": attempt,
        "attempts": attempt,
        "text": text,
        "start": start,
        "next": end,
        "size": end if size is None else size,
        "left_out": 0,
        "has_more": size is not None and end < size,
        "ended": False,
        "job_ended": False,
        "note": None,
        **more,
    }


def unknown(code: str) -> NotFoundError:
    return NotFoundError("no", response=httpx2.Response(404, request=REQUEST), body={"code": code, "message": "no"})


def followed(*answers: Any, attempt: int | None = None, status: str = "running") -> tuple[list[dict[str, Any]], list]:
    """What is shown of a server that answers so, and what it was asked."""
    coming, asked = iter(answers), []

    def read(**query: Any) -> dict[str, Any]:
        asked.append((query["attempt"], query["after"]))
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer

    shown = list(logs.followed(read, lambda: status, attempt=attempt, sleep=lambda _: None))
    assert next(coming, None) is None
    return shown, asked


def test_a_log_is_followed_through_a_new_attempt_to_the_end_of_the_job() -> None:
    shown, asked = followed(
        part("a\n"),
        part("", start=2),
        part("b\n", start=2, ended=True),
        part("", start=4, ended=True, attempts=2),
        part("c\n", attempt=2, ended=True, job_ended=True),
    )

    assert [(each["attempt"], each["text"], each.get("begins", False)) for each in shown] == [
        (1, "a\n", True),
        (1, "b\n", False),
        (2, "c\n", True),
    ]
    assert asked == [(None, 0), (1, 2), (1, 2), (1, 4), (2, 0)]


def test_following_one_attempt_ends_with_it() -> None:
    shown, _ = followed(part("a\n", ended=True, attempts=3), attempt=1)

    assert [each["text"] for each in shown] == ["a\n"]


def test_a_job_that_waits_for_its_first_attempt_is_waited_for_and_one_that_never_had_any_is_told() -> None:
    shown, _ = followed(unknown("attempt_not_found"), part("a\n", ended=True, job_ended=True))
    assert [each["text"] for each in shown] == ["a\n"]

    with pytest.raises(NotFoundError):
        followed(unknown("attempt_not_found"), status="cancelled")
    with pytest.raises(NotFoundError):
        followed(unknown("not_found"))


def test_a_server_that_restarts_is_not_the_end_of_a_log() -> None:
    away = APIConnectionError(request=REQUEST)

    shown, asked = followed(part("a\n"), away, away, part("b\n", start=2, ended=True, job_ended=True))

    assert "".join(each["text"] for each in shown) == "a\nb\n"
    assert asked[1:] == [(1, 2)] * 3


def test_without_following_everything_is_read_that_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jhead\u202e\t<b>\n"
    answers = [
        part(evil, size=200, has_more=True),
        part("tail\n", start=195, left_out=95, note="Only so much is known."),
    ]

    result = invoke(monkeypatch, lambda _: answers.pop(0), "logs", "ftjob-1")

    assert result.exit_code == 0, result.output
    assert result.stdout == "\ufffd[2Jhead\ufffd\t<b>\ntail\n"
    assert "95 bytes are left out" in result.stderr
    assert "Only so much is known." in result.stderr


def invoke(monkeypatch: pytest.MonkeyPatch, answer: Callable[[httpx2.Request], dict[str, Any]], *words: str) -> Any:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, json=answer(request)))
    client = OpenAI(base_url="http://server/v1", api_key="k", http_client=httpx2.Client(transport=transport))
    monkeypatch.setattr(main.Context, "client", property(lambda _: client))
    monkeypatch.setattr(main.Context, "credentials", property(lambda _: None))
    return CliRunner().invoke(main.cli, list(words))
