"""Rows as written beside what is read of them, harmless on a terminal."""

from __future__ import annotations

from typing import Any

import pytest
from tunepool import preflights

HOSTILE = "\x1b]0;PWNED\x07[bold]x[/bold]\x9b2J"


def report(**row: Any) -> dict[str, Any]:
    token = {"id": 1, "text": f"{HOSTILE}\nrendered", "trained": True}
    sequence = {"name": "row", "trained_token_count": 1, "token_count": 1, "tokens": [token]}
    written = {"message": 1, "what": "assistant, call", "text": f"{HOSTILE}written", "left_out": f"the call {HOSTILE}"}
    preview = {"row": 3, "fault": None, "unwritten": [HOSTILE], "sequences": [sequence], "written": [written], **row}
    able = {"system": False, "calls": True, "arguments": "object", "end_of_turn": "<|im_end|>", "stops": []}
    nothing = {"refusal": None, "files": {}, "run": None, "memory": None, "time": None, "devices": [], "auto": []}
    return {"report": {**nothing, "ok": True, "tokens": {"preview": [preview], "template": able}}}


@pytest.mark.parametrize("diff", [True, False])
def test_text_of_rows_does_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str], diff: bool) -> None:
    preflights.show(report(), wide=False, diff=diff)
    out = capsys.readouterr().out

    assert all(one.isprintable() or one == "\n" for one in out)
    assert "rendered" in out
    assert ("written" in out) is diff
    assert "[bold]x[/bold]" in out


def test_what_is_left_out_stands_beside_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    preflights.show(report(), wide=False, diff=True)
    out = capsys.readouterr().out

    assert "messages[1] assistant, call" in out
    assert "left out: the call" in out
    assert "ends a turn with <|im_end|>; does not write: system" in out


def test_a_server_that_will_not_take_the_product_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    answer = report()
    answer["report"]["servable"] = [
        {"server": "peft", "servable": True, "reason": None},
        {"server": "vllm", "servable": False, "reason": "It does not take DoRA's magnitudes; merge it."},
    ]

    preflights.show(answer, wide=False, diff=False)
    out = capsys.readouterr().out

    assert "vllm cannot serve it. It does not take DoRA's magnitudes" in out
    assert "peft" not in out


def test_each_device_is_told_with_its_time_and_an_older_servers_without(capsys: pytest.CaptureFixture[str]) -> None:
    answer = report()
    fits = {"kind": "cuda", "fits": True, "reason": "free now"}
    answer["report"]["devices"] = [
        {**fits, "name": "H100", "time": {"low": 60.0, "high": 240.0}},
        {**fits, "name": "L4", "time": None},
        {**fits, "name": "A10"},
    ]

    preflights.show(answer, wide=False, diff=False)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}

    assert "0:01:00 to 0:04:00" in lines["H100"]
    assert "–" in lines["L4"]
    assert "–" in lines["A10"]
