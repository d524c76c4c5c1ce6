"""Gates: what they say of a report, and what is refused with line and column."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tunepool.formula
import tunepool.gate
import tunepool.gate_file
import yaml
from tunepool import main, requests
from typer.testing import CliRunner

from shared.contract.evaluation import EvaluationReport
from shared.contract.gate import BadGate, GateResult, judge, read_report
from shared.contract.gate_file import MAX_BYTES, SCHEMA, read_gate

ROOT = Path(__file__).parents[2]
TUNED = "ft:smollm2-135m-instruct:acme:tickets:0193a1b2"
ROLES = {"candidate": TUNED, "prod": "support-bot@prod", "base": "smollm2-135m-instruct"}


def figure(mean: float | None, low: float | None = None, high: float | None = None, *, n: int = 200) -> dict[str, Any]:
    return {"n": n, "mean": mean, "low": low, "high": high}


def report() -> dict[str, Any]:
    return {
        "subjects": {
            TUNED: {
                "measures": {
                    "exact_match": figure(0.80, 0.74, 0.86),
                    "valid_json": figure(1.0, 1.0, 1.0),
                    "loss": figure(1.0, 0.9, 1.1),
                    "broken": figure(None, n=0),
                    "single": figure(1.0, n=1),
                }
            },
            "support-bot@prod": {"measures": {"exact_match": figure(0.79, 0.73, 0.85), "loss": figure(1.05, 0.9, 1.2)}},
            "smollm2-135m-instruct": {
                "measures": {"exact_match": figure(0.2, 0.1, 0.3), "loss": figure(2.0, 1.8, 2.2)}
            },
        },
        "differences": [
            {"subject": TUNED, "against": "support-bot@prod", "measure": "exact_match", **figure(0.01, -0.005, 0.025)}
        ],
        "forgetting": {
            "subjects": {
                TUNED: {"measures": {"loss": figure(2.05, 2.0, 2.1, n=40)}},
                "smollm2-135m-instruct": {"measures": {"loss": figure(2.0, 1.95, 2.05, n=40)}},
            },
            "differences": [],
        },
    }


def judged(*assertions: Any, **changes: Any) -> GateResult:
    gate = read_gate(json.dumps({"assertions": list(assertions)}).encode())  # JSON is YAML
    facts = {"candidate": {"size_bytes": 9_000_000, "device_seconds": 120.0}}
    return judge(gate, read_report({**report(), **changes}, roles=ROLES, facts=facts))


@pytest.mark.parametrize(
    ("assertion", "status"),
    [
        ("candidate.exact_match >= prod.exact_match - 0.01", "passed"),
        ("candidate.exact_match >= prod.exact_match + 0.02", "failed"),
        ("candidate.valid_json == 1", "passed"),
        ("candidate.exact_match == 1", "failed"),
        ("candidate.forgetting.loss <= base.forgetting.loss * 1.03", "passed"),
        ("candidate.forgetting.loss <= base.forgetting.loss * 1.02", "failed"),
        ("candidate.size_bytes < 10 * 1000 ^ 2", "passed"),
        ("candidate.device_seconds <= 60", "failed"),
        ("min(candidate.exact_match, prod.exact_match) > 0.5", "passed"),
        ("candidate.exact_match - prod.exact_match == 0.1 - 0.09", "passed"),  # but for rounding
        ("1 / (candidate.valid_json - 1) > 0", "undecided"),
        ("candidate.broken > 0", "undecided"),
    ],
)
def test_an_assertion_compares_means(assertion: str, status: str) -> None:
    result = judged(assertion)

    assert result.status == status
    assert result.outcomes[0].reason.endswith(".")


@pytest.mark.parametrize(
    ("assertion", "status"),
    [
        # The paired interval is narrower than the two apart, and it is the one that counts.
        ("candidate.exact_match >= prod.exact_match - 0.01", "passed"),
        ("candidate.exact_match >= prod.exact_match", "undecided"),
        ("prod.exact_match > candidate.exact_match + 0.03", "failed"),
        ("candidate.loss < base.loss", "passed"),
        ("candidate.loss < prod.loss", "undecided"),
        ("2 * candidate.loss / 4 + 1 > 5", "failed"),
        ("candidate.valid_json == 1", "passed"),
        ("candidate.exact_match == 0.8", "undecided"),
        ("candidate.exact_match == 0.5", "failed"),
        ("candidate.single >= 0.5", "undecided"),
        ("candidate.size_bytes < 5", "undecided"),
    ],
)
def test_confidently_asks_the_whole_interval(assertion: str, status: str) -> None:
    assert judged({"assert": assertion, "confidently": True}).status == status


def test_a_gate_fails_before_it_is_undecided_and_passes_only_as_a_whole() -> None:
    passed, failed, undecided = "candidate.loss < 2", "candidate.loss > 2", "candidate.broken > 0"

    assert judged(passed, undecided, failed).status == "failed"
    assert judged(passed, undecided).status == "undecided"
    assert judged(passed, passed).status == "passed"


def test_too_few_items_leave_it_undecided_and_an_absent_subject_is_not_asked_where_so_stated() -> None:
    assert judged({"assert": "candidate.single == 1", "least_items": 2}).status == "undecided"
    assert judged({"assert": "candidate.single == 1"}).status == "passed"
    assert judged({"assert": "candidate.loss < canary.loss", "if_present": "canary"}).status == "passed"


@pytest.mark.parametrize(
    ("assertion", "words"),
    [
        ("candidate.exact_mach > 0", "no measure 'candidate.exact_mach'; it has: candidate.broken"),
        ("canary.loss > 0", "no subject 'canary'; it has: base, candidate, ft:"),
    ],
)
def test_a_name_that_the_report_lacks_is_refused_at_its_place(assertion: str, words: str) -> None:
    gate = read_gate(f"assertions:\n  - candidate.loss < 9\n  - assert: {assertion}\n".encode())

    with pytest.raises(BadGate) as refused:
        judge(gate, read_report(report(), roles=ROLES))

    assert words in refused.value.message
    assert (refused.value.line, refused.value.column) == (3, 13)


def test_a_result_is_json_with_figures_place_and_reason_even_of_what_is_not_finite() -> None:
    numbers = report()
    numbers["subjects"][TUNED]["measures"]["loss"]["mean"] = math.nan
    document = judged("candidate.loss < 2", subjects=numbers["subjects"]).document()

    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["status"] == "undecided"
    assert document["assertions"][0]["figures"]["candidate.loss"]["mean"] is None
    assert (document["assertions"][0]["line"], len(document["gate_sha256"])) == (1, 64)


@pytest.mark.parametrize(
    ("text", "words", "place"),
    [
        ("", "is empty", (1, 1)),
        ("assertions: []\n", "a list of 1 to 200", (1, 13)),
        ("assertion:\n  - a.b > 1\n", "no 'assertion'; it may have version, assertions", (1, 1)),
        ("- a.b > 1\n", "must be a mapping", (1, 1)),
        ("version: 2\nassertions: [a.b > 1]\n", "must be 1", (1, 10)),
        ("assertions:\n  - a.b > 1\nassertions:\n  - a.b > 2\n", "stands twice", (3, 1)),
        ("assertions:\n  - assert: a.b > 1\n    confident: true\n", "no 'confident'", (3, 5)),
        ("assertions:\n  - assert: a.b > 1\n    confidently: maybe\n", "must be true or false", (3, 18)),
        ("assertions:\n  - assert: a.b > 1\n    least_items: 0\n", "1 to 1,000,000", (3, 18)),
        ("assertions:\n  - title: x\n", "needs 'assert'", (2, 5)),
        ("assertions:\n  - 7\n", "is a text", (2, 5)),
        ("assertions:\n  - a.b\n", "compare two sides once", (2, 5)),
        ("assertions:\n  - 1 < a.b < 3\n", "compare two sides once", (2, 5)),
        ("assertions:\n  - a.b = 3\n", "compare two sides once", (2, 5)),
        ("assertions:\n  - loss < 3\n", "as subject.measure", (2, 5)),
        ("assertions:\n  - 1 < 3\n", "as subject.measure", (2, 5)),
        ("assertions:\n  - a.b > __import__('os').system('x')\n", "a side", (2, 5)),
        ("assertions:\n  - a.b > (1).real\n", "a side may hold only", (2, 5)),
        ("assertions:\n  - a.b > min\n", "without its arguments", (2, 5)),
        ("assertions:\n  - {assert: a.b * c.d > 1, confidently: true}\n", "add up names", (2, 14)),
        ("assertions:\n  - {assert: a.b > 1/0, confidently: true}\n", "division by zero", (2, 14)),
        ("assertions: [&x a.b > 1, *x]\n", "no anchors", (1, 14)),
        ("assertions: [!!python/object:os.system x]\n", "no tags", (1, 14)),
        ("assertions:\n\t- a.b > 1\n", "no YAML", (2, 1)),
        ("assertions: [a.b > 1\n", "no YAML", (2, 1)),
        ("a: " + "[" * 12 + "]" * 12 + "\n", "deeper than 12", (1, 15)),
    ],
)
def test_what_is_no_gate_is_refused_with_line_and_column(text: str, words: str, place: tuple[int, int]) -> None:
    with pytest.raises(BadGate) as refused:
        read_gate(text.encode())

    assert words in refused.value.message
    assert (refused.value.line, refused.value.column) == place


@pytest.mark.parametrize(
    "data",
    [
        b"#" * 10_000_000,
        b"[" * MAX_BYTES,
        b"{a: " * 60_000,
        b"- " * 100_000,
        b"assertions: [a.b > " + b"(" * 200_000 + b"]",
        b"assertions: [a.b > " + b"-" * 900 + b"1]",
        b"assertions: [" + b"a.b > 1, " * 20_000 + b"]",
        b"a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
        b"\xff\xfe\x00",
        b"assertions: [a.b > \x00]",
    ],
)
def test_a_bomb_is_refused_at_once(data: bytes) -> None:
    began = time.process_time()
    with pytest.raises(BadGate):
        read_gate(data)

    assert time.process_time() - began < 10  # seconds of this process; most take none, the longest list a few


@pytest.mark.parametrize(
    "document",
    [
        {},
        [],
        {"subjects": {}},
        {"subjects": {"a": 1}},
        {"subjects": {"a": {"measures": {"b": {"mean": "1"}}}}},
        {"subjects": {"a": {"measures": {"b": True}}}},
        {"subjects": {"a": {"measures": {}}}, "differences": {}},
        {"subjects": {"a": {"measures": {}}}, "differences": [{"subject": "a"}]},
        {"subjects": {"a": {"measures": {}}}, "forgetting": 3},
    ],
)
def test_what_is_no_report_is_refused(document: Any) -> None:
    with pytest.raises(BadGate):
        read_report(document)


def test_a_role_that_names_no_subject_is_refused_by_name() -> None:
    with pytest.raises(BadGate, match="no subject 'ft:gone' to be 'candidate'"):
        read_report(report(), roles={"candidate": "ft:gone"})


def test_the_report_that_evaluations_write_is_one_that_a_gate_reads() -> None:
    facts = {"exact_match": {"type": "exact_match", "better": "higher"}}
    whole = report()
    whole["forgetting"] |= {"items": 40, "failures": 0}
    stored = EvaluationReport.model_validate(
        {**whole, "items": 200, "failures": 0, "measures": facts, "slices": [], "resamples": 1000, "seed": 0}
    )
    figures = read_report(stored.model_dump(mode="json"), roles=ROLES).figures

    assert figures["candidate.exact_match"].mean == 0.8
    assert figures["base.forgetting.loss"].high == 2.05


def test_the_schema_accepts_and_refuses_what_the_reader_does() -> None:
    good = ["assertions: [a.b > 1]", "version: 1\nassertions: [{assert: a.b > 1, confidently: true, title: x}]"]
    bad = [
        "assertions: []",
        "version: 2\nassertions: [a.b > 1]",
        "assertions: [{assert: a.b > 1, least_items: 0}]",
        "a: 1",
    ]
    for text in good:
        jsonschema.validate(yaml.safe_load(text), SCHEMA)
        read_gate(text.encode())
    for text in bad:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(text), SCHEMA)
        with pytest.raises(BadGate):
            read_gate(text.encode())


def test_the_published_schema_is_the_one_in_force() -> None:
    assert json.loads((ROOT / "docs/gate.schema.json").read_text(encoding="utf-8")) == SCHEMA


# ---- the command


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main.cli, list(words), env={"OPENAI_BASE_URL": "", "TUNEPOOL_HOME": "/nowhere"})
    refusal = done.exception if isinstance(done.exception, requests.BadSetting) else ""
    return done.exit_code, f"{done.output}{refusal}"


@pytest.mark.parametrize(
    ("assertion", "code"),
    [("candidate.loss < 2", 0), ("candidate.loss > 2", 1), ("candidate.broken > 2", 7), ("candidate.x > 2", 1)],
)
def test_gate_check_answers_by_its_exit_code_without_a_server(tmp_path: Path, assertion: str, code: int) -> None:
    gate, figures = tmp_path / "gate.yaml", tmp_path / "evaluation.json"
    gate.write_text(f"assertions:\n  - {assertion}\n")
    figures.write_text(json.dumps({"object": "tunepool.evaluation", "report": report()}))

    exit_code, out = run("gate", "check", str(gate), "--report", str(figures), "--as", f"candidate={TUNED}")

    assert exit_code == code
    if ".x" in assertion:  # a sentence and code 2 in a real process: `app` turns BadSetting into it
        assert f"{gate}:2:5: The report has no measure" in out
    else:
        assert out.splitlines()[-1].startswith("gate: ")


def test_gate_schema_prints_the_schema() -> None:
    exit_code, out = run("gate", "schema")

    assert (exit_code, json.loads(out)) == (0, SCHEMA)


def test_the_command_line_carries_the_very_modules_of_the_server() -> None:
    for module in (tunepool.gate, tunepool.gate_file, tunepool.formula):
        assert module.__file__ is not None
        name = Path(module.__file__).name
        assert Path(module.__file__).resolve() == ROOT / "shared/contract" / name
