"""`tunepool evaluate`: what it asks, how it waits, and how figures stand in the table."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from tunepool import evaluating, main
from tunepool.requests import BadSetting
from typer.testing import CliRunner

FIGURE = {"n": 20, "mean": 0.75, "low": 0.5, "high": 0.9}
REPORT = {
    "items": 20,
    "failures": 1,
    "subjects": {"tiny": {"measures": {"right": FIGURE}, "failures": 1}},
    "differences": [{"subject": "ft:x", "against": "tiny", "measure": "right", **FIGURE, "mean": 0.123456}],
    "slices": [{"key": "topic", "value": None, "items": 1, "subjects": {"tiny": {"measures": {"right": FIGURE}}}}],
    "forgetting": None,
}


class Served:
    """A server whose evaluation has ended at the third look."""

    def __init__(self, status: str = "succeeded") -> None:
        self.asked: list[dict[str, Any]] = []
        self.looks = 0
        self.status = status

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        if request.method == "POST":
            self.asked.append(json.loads(request.content))
            return httpx2.Response(200, json=self.record("queued"))
        self.looks += 1
        states = ["queued", "running", self.status]
        return httpx2.Response(200, json=self.record(states[min(self.looks, 3) - 1]))

    def record(self, status: str) -> dict[str, Any]:
        return {
            "id": "eval_1",
            "status": status,
            "detail": "It waits for a worker to take it.",
            "items": 20,
            "answered": 7,
            "request": {"subjects": ["tiny", "ft:x"]},
            "error": {"message": "There is no item."} if status == "failed" else None,
            "report": REPORT if status == "succeeded" else None,
        }

    def client(self) -> OpenAI:
        transport = httpx2.Client(transport=httpx2.MockTransport(self.answer))
        return OpenAI(base_url="http://server/v1", api_key="tp_x", http_client=transport)


def run(monkeypatch: pytest.MonkeyPatch, served: Served, *words: str, exit_code: int = 0) -> str:
    monkeypatch.setattr(main, "find_credentials", lambda *_, **__: served)
    monkeypatch.setattr(evaluating, "POLL_SECONDS", 0.0)
    done = CliRunner().invoke(main.cli, [*words])
    assert done.exit_code == exit_code, done.output
    return done.output


def test_the_figures_stand_with_their_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served()

    out = run(
        monkeypatch, served, "evaluate", "general", "--subject", "tiny", "--measure", "right=exact_match", "--wait"
    )

    assert served.asked == [
        {
            "subjects": ["tiny"],
            "items": {"type": "suite", "suite": "general"},
            "measures": [{"type": "exact_match", "name": "right"}],
        }
    ]
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "tiny right 20 0.75 0.5 to 0.9" in lines
    assert "ft:x tiny right 20 0.1235 0.5 to 0.9" in lines
    assert "running: 7 of 40 answers" in lines
    assert "topic = -: 1 items" in lines


def test_without_waiting_the_id_is_printed_and_as_json_the_whole_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, Served(), "evaluate", "general", "--subject", "tiny") == "eval_1\n"
    words = ("--json", "evaluate", "ftjob-1", "--share", "0.2", "--subject", "tiny", "--wait")
    served = Served()
    out = run(monkeypatch, served, *words)
    assert json.loads(out.splitlines()[-1])["report"]["items"] == 20
    assert served.asked[0]["items"] == {"type": "split", "job": "ftjob-1", "share": 0.2}


def test_one_that_fails_says_why_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(monkeypatch, Served("failed"), "evaluate", "general", "--subject", "tiny", "--wait", exit_code=1)

    assert "There is no item." in out


def test_a_measure_is_a_type_a_name_with_one_or_json() -> None:
    words = ["loss", "right=exact_match", '{"type": "regex", "pattern": "a"}']

    assert evaluating.measures_of(words) == [
        {"type": "loss", "name": "loss"},
        {"type": "exact_match", "name": "right"},
        {"name": "regex", "type": "regex", "pattern": "a"},
    ]
    with pytest.raises(BadSetting):
        evaluating.measures_of(["{"])
