"""Loss of adapters on rows nobody trained on: `python -m bench.recipes.held_out_loss SPEC ROWS ADAPTER…` prints JSON.

Row by row on the base as SPEC has it (in four bits for QLoRA), in its dtype, with plain transformers and PEFT: no
packing, no padding and no loss of ours.
`base` in the answer is the model without any adapter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.contract.spec import AttemptSpec
from worker.train.base_model import four_bit
from worker.train.data import RowReader, TokenRow


def main(spec_file: Path, rows_file: Path, adapters: Sequence[str]) -> dict[str, float]:
    """Adapter directory → mean loss per labelled token of the canonical JSONL file ROWS."""
    spec = AttemptSpec.model_validate_json(spec_file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(spec.base_model_path, trust_remote_code=False)
    rows = RowReader(tokenizer, facts=spec.job.data, training=spec.job.training).read(rows_file).rows
    base = AutoModelForCausalLM.from_pretrained(
        spec.base_model_path,
        quantization_config=four_bit(spec.job.quantization) if spec.job.quantization.load_in_4bit else None,
        dtype=getattr(torch, spec.job.training.dtype),
        trust_remote_code=False,
    )
    losses = {"base": loss(base.eval(), rows)}
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters):
        if number:
            model.load_adapter(adapter, adapter_name=str(number))
        model.set_adapter(str(number))
        losses[adapter] = loss(model.eval(), rows)
    return losses


@torch.inference_mode()
def loss(model: Any, rows: Sequence[TokenRow]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids = torch.from_numpy(row.ids).long()
        labelled = torch.from_numpy(row.labelled)[1:]
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        total += float(cross_entropy(logits[labelled], ids[1:][labelled], reduction="sum"))
        count += row.labelled_tokens
    return total / count


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
