"""What the law costs: `python bench/law_cost.py MODEL_FOLDER [rows] [rounds]`.

"Rendered against written": each row is looked for in what its template made of it (`worker.train.written`). Reads the
same rows as a preflight's process does, in turns with that look and without it, in one process, and prints processor
seconds of both and the look's share: of plain conversations, and of conversations with tools, calls, results and
reasoning under Qwen3's template. MODEL_FOLDER holds a base model's tokenizer; without it, the built-in model's in the
home's cache.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trl
from transformers import AutoTokenizer

import worker.train.data
from bench.dataset_check import WORDS, write_rows
from bench.machine import header
from shared.contract.spec import DataFacts, Training
from shared.settings import Settings
from shared.settle.catalogue import SMOLLM2, local_folder
from worker.train.data import RowReader
from worker.train.preflight import LineRange, _Inherited, count_stretch, stretches

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": f"look_up_{subject}",
            "description": f"Looks a {subject} up by its number and the day.",
            "parameters": {
                "type": "object",
                "properties": {
                    "number": {"type": "integer", "description": "Its number."},
                    "day": {"type": "string", "description": "The day.", "enum": ["today", "tomorrow"]},
                },
                "required": ["number"],
            },
        },
    }
    for subject in ("parcel", "ticket", "invoice")
]


def calling_rows(path: Path, *, rows: int, seed: int) -> None:
    dice = random.Random(seed)

    def words(least: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(least, 3 * least)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            arguments = json.dumps({"number": number, "day": "today"})
            function = {"name": "look_up_parcel", "arguments": arguments}
            call = {"id": f"call_{number}", "type": "function", "function": function}
            result = json.dumps({"number": number, "place": words(2), "late": False})
            turns = [
                {"role": "system", "content": words(20)},
                {"role": "user", "content": words(8)},
                {"role": "assistant", "content": "", "reasoning_content": words(20), "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": result},
                {"role": "assistant", "content": words(12)},
            ]
            file.write(json.dumps({"messages": turns, "tools": TOOLS}) + "\n")


def without_the_law() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(worker.train.data, "lost", lambda *_, **__: [])  # noqa: PT008 -- a mock would take time


def seconds(stretch: LineRange) -> float:
    """Of this thread's processor, for some rows, as one process of a preflight reads them."""
    began = time.thread_time()
    counted = count_stretch(stretch)
    assert not counted.fault_count, counted.faults
    return time.thread_time() - began


def measure(tokenizer: Any, file: Path, *, rows: int, rounds: int) -> tuple[float, float]:
    """Seconds with the law and without it, over all rounds: each stretch of rows is read in turns, so that what else
    goes on at the machine strikes both alike."""
    facts = DataFacts(format="chat", train_rows=rows)
    _Inherited.reader = RowReader(tokenizer, facts=facts, training=Training(max_length=2048))
    _Inherited.decode = tokenizer.decode
    parts = list(stretches(file, size=1 << 15))
    seconds(parts[0])  # templates compiled
    spent = {True: 0.0, False: 0.0}
    for turn in range(rounds):
        for place, stretch in enumerate(parts):
            for lawful in (True, False) if (turn + place) % 2 else (False, True):
                with contextlib.nullcontext() if lawful else without_the_law():
                    spent[lawful] += seconds(stretch)
    return spent[True], spent[False]


def main() -> None:
    print(header(), flush=True)
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    folders = [Path(word) for word in sys.argv[1:] if not word.isdigit()]
    model = folders[0] if folders else local_folder(SMOLLM2, cache=Settings().cache)
    rows, rounds = (*numbers, *(2000, 5)[len(numbers) :])
    if not (model / "tokenizer.json").is_file():
        print(f"skipped: no tokenizer in {model}; run `make demo` once, or name a model's folder")
        return
    templates = Path(trl.__file__).parent / "chat_templates"
    with tempfile.TemporaryDirectory() as place:
        plain, calling = Path(place) / "plain.jsonl", Path(place) / "calling.jsonl"
        write_rows(plain, rows=rows, seed=1)
        calling_rows(calling, rows=rows, seed=1)
        for name, file, template in (("plain", plain, None), ("tools, calls, reasoning", calling, "qwen3.jinja")):
            tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
            if template:
                tokenizer.chat_template = (templates / template).read_text(encoding="utf-8")
            whole, without = measure(tokenizer, file, rows=rows, rounds=rounds)
            share = 1 - without / whole
            print(f"{name:24} {whole:6.2f} s with the law  {without:6.2f} s without  {share:6.1%} of the whole")


if __name__ == "__main__":
    main()
