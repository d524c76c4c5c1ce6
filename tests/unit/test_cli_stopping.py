"""Every command that waits says, when a signal ends it, what becomes of what it waited for."""

from __future__ import annotations

import signal
from typing import Any

import httpx2
import pytest
from openai import OpenAI
from tunepool import main
from tunepool.watching import WatchInterrupted
from typer.testing import CliRunner

JOB = {
    "id": "ftjob-1",
    "object": "fine_tuning.job",
    "status": "running",
    "created_at": 1,
    "model": "tiny",
    "fine_tuned_model": None,
    "finished_at": None,
    "error": None,
    "hyperparameters": {},
    "organization_id": "o",
    "result_files": [],
    "seed": 0,
    "trained_tokens": None,
    "training_file": "file-1",
    "validation_file": None,
}
RECORD = {"status": "queued", "detail": None, "items": 0, "request": {"subjects": ["tiny"]}, "error": None}
ANSWERS: dict[str, dict[str, Any]] = {
    "GET models/tiny": {"id": "tiny", "object": "model", "created": 1, "owned_by": "tunepool"},
    "POST fine_tuning/jobs": JOB,
    "GET fine_tuning/jobs/ftjob-1": JOB,
    "GET fine_tuning/jobs/ftjob-1/events": {"object": "list", "data": [], "has_more": False},
    "POST tunepool/evaluations": {"id": "eval_1", **RECORD},
    "POST tunepool/preflights": {"id": "pre_1", **RECORD},
    "POST tunepool/models": {"id": "tiny", "state": "resolving", "detail": None},
    "POST tunepool/models/tiny/check": {"id": "tiny", "state": "resolving", "detail": None},
    "POST tunepool/models/tiny/prefetch": {"data": [{"state": "fetching"}]},
    "POST tunepool/merges": {"id": "merge_1", **RECORD},
    "POST tunepool/combinations": {"id": "ft:combined", **RECORD},
    "POST tunepool/exports": {"id": "export_1", **RECORD},
    "POST tunepool/pushes": {"id": "push_1", **RECORD},
}


class Interrupting:
    """A server in whose answer to one request the signal comes.

    `refuses`: it takes no cancellation then. `goes`: it answers nothing then.
    """

    def __init__(self, number: signal.Signals, at: str, *, refuses: bool = False, goes: bool = False) -> None:
        self.number, self.at, self.refuses, self.goes = number, at, refuses, goes
        self.asked: list[str] = []

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        asked = f"{request.method} {request.url.path.removeprefix('/v1/')}"
        self.asked.append(asked)
        if asked == self.at:
            signal.raise_signal(self.number)
        elif self.goes and self.at in self.asked:
            raise httpx2.ConnectError("away", request=request)
        elif self.refuses and self.at in self.asked:
            return httpx2.Response(409, json={"error": {"message": "It has succeeded.", "code": "ended"}})
        return httpx2.Response(200, json=ANSWERS.get(asked, {"id": "x", "status": "cancelled"}))

    def client(self) -> OpenAI:
        transport = httpx2.Client(transport=httpx2.MockTransport(self.answer))
        return OpenAI(base_url="http://server/v1", api_key="tp_x", http_client=transport, max_retries=0)


def stopped(monkeypatch: pytest.MonkeyPatch, server: Interrupting, words: str) -> tuple[WatchInterrupted, str]:
    """What ended the command, and what was printed before."""
    monkeypatch.setattr(main, "find_credentials", lambda *_, **__: server)
    done = CliRunner().invoke(main.cli, words.split(), input="a question\n")
    assert isinstance(done.exception, WatchInterrupted), (done.exception, done.output)
    return done.exception, done.output


WAITING = [
    ("submit file-1 --model tiny", "GET models/tiny", "tunepool jobs list shows"),
    ("submit file-1 --model tiny --wait", "GET fine_tuning/jobs/ftjob-1", "goes on: tunepool watch ftjob-1"),
    ("watch ftjob-1", "GET fine_tuning/jobs/ftjob-1", "Job ftjob-1 goes on: tunepool watch ftjob-1"),
    ("logs ftjob-1 -f", "GET tunepool/jobs/ftjob-1/logs", "ftjob-1 goes its way"),
    ("evaluate general --subject tiny --wait", "GET tunepool/evaluations/eval_1", "Evaluation eval_1 goes on"),
    ("models add /tiny --wait", "GET tunepool/models/tiny", "tunepool models show tiny"),
    ("models check tiny --wait", "GET tunepool/models/tiny", "tunepool models show tiny"),
    ("models prefetch tiny --wait", "GET tunepool/models/tiny/prefetch", "The workers go on"),
    ("adapters merge ft:tiny --onto base --wait", "GET tunepool/merges/merge_1", "tunepool adapters show merge_1"),
    ("adapters combine ft:a ft:b --type cat --wait", "GET tunepool/adapters/ft:combined", "ft:combined goes on"),
    ("export ft:tiny --wait", "GET tunepool/exports/export_1", "tunepool exports show export_1"),
    ("push ft:tiny --repo a/b --wait", "GET tunepool/exports/push_1", "push_1 goes on"),
    ("chat tiny", "POST chat/completions", "The conversation is over"),
]


@pytest.mark.parametrize(("words", "at", "says"), WAITING)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_waits_says_what_goes_on(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, words: str, at: str, says: str
) -> None:
    before = signal.getsignal(number)
    server = Interrupting(number, at)

    ended, _ = stopped(monkeypatch, server, words)

    assert says in str(ended)
    assert (ended.signal, signal.getsignal(number)) == (number, before)
    assert server.asked[-1] == at, "nothing is asked after the signal"


@pytest.mark.parametrize(
    ("words", "at", "order"),
    [
        (
            "watch ftjob-1 --on-interrupt cancel",
            "GET fine_tuning/jobs/ftjob-1",
            "POST fine_tuning/jobs/ftjob-1/cancel",
        ),
        (
            "evaluate general --subject tiny --wait --on-interrupt cancel",
            "GET tunepool/evaluations/eval_1",
            "POST tunepool/evaluations/eval_1/cancel",
        ),
        ("preflight file-1 --model tiny", "GET tunepool/preflights/pre_1", "DELETE tunepool/preflights/pre_1"),
    ],
)
def test_what_is_cancelled_is_said_before_the_server_answers_and_after(
    monkeypatch: pytest.MonkeyPatch, words: str, at: str, order: str
) -> None:
    server = Interrupting(signal.SIGTERM, at)

    ended, printed = stopped(monkeypatch, server, words)

    assert "waits for the server to take the cancellation" in printed
    assert "cancelled" in str(ended)
    assert server.asked[-1] == order


@pytest.mark.parametrize(
    ("away", "says"),
    [
        (False, "The server did not cancel it: It has succeeded. (code: ended)"),
        (True, "The server does not answer: it was not cancelled. Job ftjob-1 goes on: tunepool watch ftjob-1"),
    ],
)
def test_a_job_that_could_not_be_cancelled_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, *, away: bool, says: str
) -> None:
    server = Interrupting(signal.SIGINT, "GET fine_tuning/jobs/ftjob-1", refuses=not away, goes=away)

    ended, _ = stopped(monkeypatch, server, "watch ftjob-1 --on-interrupt cancel")

    assert str(ended) == says
