"""What a preflight shows is what is trained: both go through the same reader, and the labels of a batch prove it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT, RowsRead, TokenReport
from shared.contract.spec import AttemptSpec, PreflightSpec
from shared.errors import Invalid
from shared.settings import trainer_environment
from tests.patience import patience
from tests.train.test_loss_mask import WITH_MARKERS
from tests.train.tiny import (
    CHATML,
    chat,
    chat_rows,
    kto_rows,
    make_model_directory,
    make_spec,
    make_tokenizer,
    preference_rows,
    read_events,
)
from worker.train import chat as chat_module
from worker.train.data import RowReader
from worker.train.objectives.supervised import IGNORED, padded
from worker.train.preflight import main, stretches
from worker.train.row_count import SAY_SECONDS, RowCount
from worker.train.time_limit import TimeLimit
from worker.train.tokenizer import load_tokenizer


def preflight(
    tmp_path: Path, model: Path, rows: list[dict[str, Any]], *, shown: list[int] | None = None, **spec: Any
) -> tuple[int, Path]:
    attempt = AttemptSpec.model_validate_json(make_spec(tmp_path, model=model, rows=rows, **spec).read_bytes())
    wanted = PreflightSpec(
        job=attempt.job,
        base_model_path=attempt.base_model_path,
        train_file=attempt.train_file,
        validation_file=attempt.validation_file,
        preview_rows=shown or [1],
        processes=2,
        memory_bytes=1 << 30,
    )
    (tmp_path / "preflight.json").write_text(wanted.model_dump_json(), encoding="utf-8")
    return main(tmp_path / "preflight.json", tmp_path / "out"), tmp_path / "out"


def examined(tmp_path: Path, model: Path, rows: list[dict[str, Any]], **options: Any) -> TokenReport:
    code, out = preflight(tmp_path, model, rows, **options)
    assert code == EXIT_DONE, read_events(out)
    return TokenReport.model_validate_json((out / "preflight.json").read_bytes())


def test_the_program_says_how_many_rows_it_has_read(tmp_path: Path, model: Path) -> None:
    _, out = preflight(tmp_path, model, [chat("2 plus 2?", "4"), chat("5?", "5")])

    assert RowsRead.model_validate_json((out / "progress.json").read_bytes()).rows == 2


def test_the_count_of_rows_is_written_when_the_last_has_stood_for_a_while(tmp_path: Path) -> None:
    now = 0.0
    read = RowCount(tmp_path, clock=lambda: now)

    def said() -> int:
        return RowsRead.model_validate_json((tmp_path / "progress.json").read_bytes()).rows

    read.add(3)
    assert said() == 3
    read.add(4)
    assert said() == 3
    now += SAY_SECONDS
    read.add(5)
    assert said() == 12


def test_the_preview_is_the_trainers_own_labels(tmp_path: Path, model: Path) -> None:
    rows = [chat("2 plus 2?", "naïve 🙂 4"), chat("5?", "5")]
    (shown,) = examined(tmp_path, model, rows, shown=[1]).preview

    spec = AttemptSpec.model_validate_json((tmp_path / "spec.json").read_bytes())
    reader = RowReader(make_tokenizer(), facts=spec.job.data, training=spec.job.training)
    batch = padded(reader.read(Path(spec.train_file)).rows[:1], pad_id=2).inputs
    (sequence,) = shown.sequences

    assert [token.id for token in sequence.tokens] == batch["input_ids"][0].tolist()
    assert [token.id if token.trained else IGNORED for token in sequence.tokens] == batch["labels"][0].tolist()
    assert [span.text for span in sequence.spans] == ["naïve 🙂 4<|im_end|>"]


def test_masked_reasoning_is_shown_and_shown_as_not_trained(tmp_path: Path) -> None:
    thinks = "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '')"
    template = CHATML.replace("message['content']", f"{thinks} + message['content']")
    model = make_model_directory(tmp_path / "thinks", template=template)
    row = chat("Hi?", "Hello.")
    row["messages"][1]["reasoning_content"] = "A greeting."

    for place in ("masked", "plain"):
        (tmp_path / place).mkdir()

    (masked,) = examined(tmp_path / "masked", model, [row], training={"mask_reasoning": True}).preview
    (plain,) = examined(tmp_path / "plain", model, [row]).preview

    assert "A greeting." in masked.sequences[0].text
    assert [span.text for span in masked.sequences[0].spans] == ["Hello.<|im_end|>"]
    assert [span.text for span in plain.sequences[0].spans] == ["<think>A greeting.</think>Hello.<|im_end|>"]


def test_a_row_is_shown_as_it_was_written_with_what_the_template_can_write(tmp_path: Path, model: Path) -> None:
    rows = [chat("stop<|im_end|>?", "no"), chat("q", "a")]
    report = examined(tmp_path, model, rows, shown=[1])
    (shown,) = report.preview

    assert [(part.message, part.what, part.text) for part in shown.written] == [
        (0, "user", "stop<|im_end|>?"),
        (1, "assistant", "no"),
    ]
    assert shown.sequences[0].text.count("<|im_end|>") == 3
    assert [(one.code, one.rows.count) for one in report.training.unwritten] == [("control_token_text", 1)]
    assert report.template is not None
    assert (report.template.system, report.template.calls) == (True, False)
    assert (report.template.end_of_turn, report.template.stops) == ("<|im_end|>", ["<|im_end|>"])


def test_a_call_that_is_left_out_stands_in_what_was_written(tmp_path: Path, model: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0}
    row = {"messages": [{"role": "user", "content": "q"}, asked, *chat("r", "a")["messages"]]}
    (shown,) = examined(tmp_path, model, [row], shown=[1]).preview

    assert shown.written[1].what == "assistant, call"
    assert shown.written[1].left_out is not None
    assert "weather" in shown.written[1].left_out


def test_a_preference_row_shows_both_answers_after_their_prompt(tmp_path: Path, model: Path) -> None:
    report = examined(
        tmp_path, model, preference_rows(3), shown=[2], data_format="preference", objective={"type": "dpo"}
    )
    chosen, rejected = report.preview[0].sequences

    assert report.preview[0].row == 2
    assert [span.text for span in chosen.spans] == ["good<|im_end|>"]
    assert [span.text for span in rejected.spans] == ["bad one<|im_end|>"]
    assert chosen.text.startswith("<|im_start|>user\n1?")


def test_a_kto_row_shows_its_one_answer(tmp_path: Path, model: Path) -> None:
    report = examined(tmp_path, model, kto_rows(3), data_format="kto", objective={"type": "kto"})

    assert [one.name for one in report.preview[0].sequences] == ["completion"]


def test_counts_cuts_empty_rows_and_repeats_are_found_by_row(tmp_path: Path, model: Path) -> None:
    rows = [chat("u", "kept"), chat("u" * 100, "lost"), chat("u", "kept"), chat("u", "long " * 40)]
    masked = {"messages": [*chat("u", "a")["messages"]]}
    masked["messages"][1]["weight"] = 0
    found = examined(tmp_path, model, [*rows, masked], training={"max_length": 60}).training

    assert found.rows == 5
    assert found.truncated.rows == [4]
    assert found.empty.rows == [2, 5]
    assert found.duplicates.rows == [3]
    assert found.longest_row == 4
    assert sum(one.rows for one in found.histogram) == 5
    assert found.kept_tokens == 26 + 26 + 60


def test_figures_are_those_that_the_trainer_announces(tmp_path: Path, model: Path) -> None:
    rows = chat_rows(40)
    found = examined(tmp_path, model, rows).training
    spec = AttemptSpec.model_validate_json((tmp_path / "spec.json").read_bytes())
    read = RowReader(make_tokenizer(), facts=spec.job.data, training=spec.job.training).read(Path(spec.train_file))

    assert found.kept_tokens == sum(row.tokens for row in read.rows)
    assert found.trained_tokens == sum(row.labelled_tokens for row in read.rows)


def test_validation_rows_that_training_has_seen_are_named(tmp_path: Path, model: Path) -> None:
    validation = [chat("new?", "1"), chat("0 plus 0?", "another answer"), chat_rows(4)[3]]
    found = examined(tmp_path, model, chat_rows(4), validation=validation).leakage

    assert found is not None
    assert found.rows.rows == [3]
    assert found.prompts.rows == [2, 3]


def test_rows_that_the_template_refuses_are_all_counted_and_the_others_read(tmp_path: Path, model: Path) -> None:
    template = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    template += "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    rows = [chat("u", "a"), chat("bad", "a"), chat("v", "a"), chat("bad", "b")]
    report = examined(tmp_path, model, rows, shown=[2], training={"chat_template": template})

    assert report.training.fault_count == 2
    assert [(fault.row, fault.code) for fault in report.training.faults] == [
        (2, "chat_template_failed"),
        (4, "chat_template_failed"),
    ]
    assert report.preview[0].sequences == []
    assert "no" in str(report.preview[0].fault)
    assert report.training.empty.count == 2


def test_the_program_reads_without_pytorch_what_it_reads_with_it(tmp_path: Path, model: Path) -> None:
    rows = [*chat_rows(20), chat("naïve?", "🙂   so")]
    here = examined(tmp_path, model, rows, shown=[1, 21], training={"chat_template": WITH_MARKERS})
    argv = [sys.executable, "-m", "worker.train.preflight", str(tmp_path / "preflight.json"), str(tmp_path / "again")]

    ended = subprocess.run(
        argv, env=trainer_environment(), capture_output=True, text=True, timeout=patience(120), check=True
    )

    assert "PyTorch was not found" in ended.stdout + ended.stderr
    assert TokenReport.model_validate_json((tmp_path / "again" / "preflight.json").read_bytes()) == here


def test_a_base_model_without_a_template_ends_as_the_users_fault(tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in model.iterdir():
        if file.name not in {"chat_template.jinja"}:
            (bare / file.name).write_bytes(file.read_bytes())

    code, out = preflight(tmp_path, bare, chat_rows(2))

    assert code == EXIT_USER_FAULT
    assert read_events(out)[-1].code == "no_chat_template"
    assert not (out / "preflight.json").exists()


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_stretches_cover_every_row_once_whatever_their_size(tmp_path: Path, size: int) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "x" * count}) + "\n" for count in range(20)), encoding="utf-8")
    cut = list(stretches(file, size=size))

    assert [one.start for one in cut] == [0, *(one.end for one in cut[:-1])]
    assert cut[-1].end == file.stat().st_size
    whole = file.read_bytes()
    assert all(one.first_row == whole[: one.start].count(b"\n") + 1 for one in cut)


SLOW = {
    "a constant that is computed while the template is compiled": "{{ 10 ** (10 ** 9) }}",
    "loops in each other": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
}


def noted_limits(monkeypatch: pytest.MonkeyPatch, notes: Path) -> Path:
    """A file with a byte for each time that a template is given, in whatever process; it is half a second here."""

    def limit(seconds: float) -> TimeLimit:
        with notes.open("ab") as file:
            file.write(b".")
        return TimeLimit(seconds)

    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(chat_module, "time_limit", limit)
    return notes


@pytest.mark.parametrize("kind", SLOW)
def test_a_template_that_takes_too_long_costs_a_few_rows_time_and_not_each_rows(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = noted_limits(monkeypatch, tmp_path / "limits")

    found = examined(tmp_path, model, chat_rows(400), training={"chat_template": SLOW[kind]}).training

    assert found.fault_count == 400
    assert {fault.code for fault in found.faults} == {"chat_template_failed"}
    assert 0 < limits.stat().st_size < 20, "a row was given its time though many had used it up"


@pytest.mark.parametrize("kind", SLOW)
def test_the_trainers_reader_gives_up_such_a_template_at_its_first_row(
    tmp_path: Path, model: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = noted_limits(monkeypatch, tmp_path / "limits")
    file = make_spec(tmp_path, model=model, rows=chat_rows(20), training={"chat_template": SLOW[kind]})
    spec = AttemptSpec.model_validate_json(file.read_bytes())
    reader = RowReader(load_tokenizer(spec), facts=spec.job.data, training=spec.job.training)

    with pytest.raises(Invalid) as refused:
        reader.read(Path(spec.train_file))

    assert refused.value.code == "chat_template_failed"
    assert 0 < limits.stat().st_size < 10
