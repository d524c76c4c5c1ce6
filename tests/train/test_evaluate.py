"""The program that answers items: base and adapters on one base, greedy answers, and losses that are upstream's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.contract.evaluation import GenerationSettings
from shared.contract.evaluation_run import ITEM_ANSWER, EvaluationSpec, ItemAnswer
from shared.contract.events import EXIT_DONE, EXIT_USER_FAULT
from shared.rows import evaluation_items
from tests.train.test_merging import make_adapter
from worker.train.evaluate import main

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me and you"}]},
    {"messages": [{"role": "user", "content": "x" * 600}, {"role": "assistant", "content": "y"}]},
    {"messages": [{"role": "user", "content": "no reference"}]},
    {"prompt": "once ", "completion": "upon"},
    {"text": "only a text"},
]
TOKENS = 12


def run(tmp: Path, base: Path, subjects: list[dict[str, Any]], **values: Any) -> tuple[int, list[ItemAnswer]]:
    """The program in this process: its exit code and what it answered."""
    lines = [json.dumps(row).encode() for row in ROWS]
    places = [subject["place"] for subject in subjects]
    tmp.mkdir(exist_ok=True)
    items = tmp / "items.jsonl"
    asked = [item.asked(places) for item in evaluation_items.items(lines, most=100)]
    items.write_text("".join(f"{one.model_dump_json()}\n" for one in asked))
    spec = EvaluationSpec(
        **{
            "base_model_path": str(base),
            "quantization": None,
            "dtype": "float32",
            "context_tokens": 8192,
            "subjects": subjects,
            "items_path": str(items),
            "generation": GenerationSettings(max_tokens=TOKENS),
            "likelihood": True,
            "answers": True,
        }
        | values
    )
    (tmp / "spec.json").write_text(spec.model_dump_json())
    code = main(tmp / "spec.json", tmp / "out")
    written = (tmp / "out" / "answers.jsonl").read_bytes().splitlines()
    return code, [ITEM_ANSWER.validate_json(line) for line in written]


@torch.no_grad()
def upstream(base: Path, adapter: Path | None) -> tuple[str, float]:
    """What transformers and PEFT alone say of the first row: the greedy answer, and the loss of the reference."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    prompt = "<|im_start|>user\nwho?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    answer = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    whole = tokenizer(prompt + "me and you<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]
    labels = whole.clone()
    labels[:, : ids.shape[1]] = -100
    return answer, float(model(whole, labels=labels).loss)


def test_every_subject_answers_on_one_base_as_upstream_does_alone(model: Path, tmp_path: Path) -> None:
    folders = [make_adapter(model, tmp_path / f"adapter_{n}", seed=n) for n in (1, 2)]
    subjects = [
        {"place": 0},
        *({"place": n, "adapter": f"a{n}", "adapter_path": str(folder)} for n, folder in enumerate(folders, start=1)),
    ]

    code, answers = run(tmp_path, model, subjects)

    assert code == EXIT_DONE
    assert sorted((one.subject, one.item) for one in answers) == [(s, n) for s in (0, 1, 2) for n in (1, 2, 3, 4, 5)]
    first = [one for one in answers if one.item == 1]
    for one, adapter in zip(first, [None, *folders], strict=True):
        answer, loss = upstream(model, adapter)
        assert one.answer == answer
        assert one.loss == pytest.approx(loss, rel=1e-5)
        assert one.loss_tokens == len("me and you") + 1
    assert len({one.loss for one in first}) == 3


def test_an_item_that_does_not_fit_says_so_and_the_others_are_answered(model: Path, tmp_path: Path) -> None:
    code, answers = run(tmp_path, model, [{"place": 0}])

    assert code == EXIT_DONE
    by_item = {one.item: one for one in answers}
    assert by_item[2].error is not None
    assert (by_item[2].error.code, by_item[2].answer, by_item[2].loss) == ("context_length_exceeded", None, None)
    assert (by_item[3].loss, by_item[3].error) == (None, None)
    assert by_item[3].answer is not None
    assert by_item[4].loss_tokens == len("upon") + 1
    assert (by_item[5].answer, by_item[5].loss_tokens) == (None, len("only a text"))
    assert all(math.isfinite(one.seconds or 0) and (one.tokens or 0) <= TOKENS for one in answers)


def test_losses_alone_generate_nothing(model: Path, tmp_path: Path) -> None:
    _, answers = run(tmp_path, model, [{"place": 0}], answers=False)

    assert {one.answer for one in answers} == {None}
    assert any(one.loss is not None for one in answers)


def test_a_seed_goes_with_the_item_and_not_with_the_order(model: Path, tmp_path: Path) -> None:
    warm = GenerationSettings(max_tokens=TOKENS, temperature=1.0, seed=7)
    _, whole = run(tmp_path, model, [{"place": 0}], generation=warm)
    (tmp_path / "out" / "answers.jsonl").unlink()
    file = tmp_path / "items.jsonl"

    code, again = run(tmp_path, model, [{"place": 0}], generation=warm)

    assert (code, file.exists()) == (EXIT_DONE, True)
    said = {one.item: one.answer for one in whole}
    assert {one.item: one.answer for one in again} == said
    _, alone = run(tmp_path / "alone", model, [{"place": 0}], generation=warm.model_copy(update={"at_once": 1}))
    assert {one.item: one.answer for one in alone} == said


def test_an_adapter_without_weights_ends_it_by_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    code, answers = run(tmp_path, model, [{"place": 0, "adapter": "a", "adapter_path": str(tmp_path / "empty")}])

    assert (code, answers) == (EXIT_USER_FAULT, [])
    assert "adapter_unusable" in (tmp_path / "out" / "events.jsonl").read_text()
