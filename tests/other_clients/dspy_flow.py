"""dspy's own way to a tuned model: python dspy_flow.py ROWS MODEL. Prints what it saw as one JSON object."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import dspy
from dspy.clients.openai import OpenAIProvider
from dspy.clients.utils_finetune import TrainDataFormat


def main(rows: Path, model: str) -> None:
    ways = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
    data = [json.loads(line) for line in rows.read_text().splitlines()]
    base = dspy.LM(f"openai/{model}", provider=OpenAIProvider(), cache=False, **ways)
    job = base.finetune(train_data=data, train_data_format=TrainDataFormat.CHAT, train_kwargs={"n_epochs": 1})
    tuned = job.result()
    if isinstance(tuned, Exception):
        raise tuned
    # LiteLLM below it knows the provider of OpenAI's own tuned models by their names, and of no others.
    tuned = tuned.copy(model=f"openai/{tuned.model}")
    sys.stdout.write(json.dumps({"model": tuned.model, "base": base("one two"), "tuned": tuned("one two")}) + "\n")


main(Path(sys.argv[1]), sys.argv[2])
