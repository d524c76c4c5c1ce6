"""What making one adapter of several holds against what was estimated: `python bench/product_memory.py [kind …]`.

The base is random: one layer with linear modules as wide as those of a model of two billion parameters, since it is the
work on one module that differs from kind to kind. Prints, for two and for four adapters, the most that the program was
resident with, the estimate, and their ratio.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from bench.machine import header
from shared.contract.base_facts import ModelFacts
from shared.contract.merge_request import CreateCombination, MergeSpec
from shared.contract.spec import (
    Adapter,
    BaseModelRef,
    DataFacts,
    JobSpec,
    Placement,
    Quantization,
    Queue,
    Supervised,
    Training,
)
from shared.settings import trainer_environment
from shared.settle.product_memory import estimate_combination
from tests.train.tiny import make_tokenizer

KINDS = ("linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties")
KINDS += ("dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")
WIDTH, INNER = 2048, 6144
ADAPTER = Adapter(method="lora", r=16, target_modules=["down_proj"])
MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


@dataclasses.dataclass(frozen=True)
class Base:
    folder: Path
    parameters: int


def make_base(folder: Path) -> Base:
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=1,
        num_attention_heads=16,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Base(folder, model.num_parameters())


def make_adapter(base: Base, folder: Path, *, seed: int) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base.folder, trust_remote_code=False)
    wanted = LoraConfig(r=ADAPTER.r, target_modules=["down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, wanted).save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def job_of(base: Base) -> JobSpec:
    facts = ModelFacts(
        architecture="LlamaForCausalLM",
        parameters=base.parameters,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=WIDTH // 16,
        intermediate_size=INNER,
        vocab_size=260,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return JobSpec(
        base_model=BaseModelRef(name="wide", public_name="wide", source="path", revision="0" * 64, facts=facts),
        objective=Supervised(),
        data=DataFacts(format="chat", train_rows=1),
        adapter=ADAPTER,
        quantization=Quantization(),
        training=Training(max_length=256),
        placement=Placement(),
        queue=Queue(),
        seed=1,
    )


def request_of(kind: str, *, adapters: int) -> CreateCombination:
    parts = [{"adapter": f"ft:{number}", "weight": 1 / adapters} for number in range(adapters)]
    density = 0.5 if kind.startswith(("ties", "dare", "magnitude")) else None
    return CreateCombination.model_validate({"adapters": parts, "combination_type": kind, "density": density})


def peak(spec: MergeSpec, folder: Path) -> int:
    """The most bytes that the program was resident with."""
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    argv = [sys.executable, "-m", "worker.train.combine", str(folder / "spec.json"), str(folder / "out")]
    # From a small process: a program's peak counts what the one weighs that starts it.
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *argv], env=trainer_environment(), check=True, capture_output=True, text=True
    )
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    print(header(), flush=True)
    kinds = sys.argv[1:] or KINDS
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = make_base(folder / "base")
        adapters = [str(make_adapter(base, folder / f"adapter-{seed}", seed=seed)) for seed in range(4)]
        print(f"{'':22}{'adapters':>8}{'measured':>10}{'estimated':>11}{'ratio':>7}")
        for kind in kinds:
            for count in (2, 4):
                request, job = request_of(kind, adapters=count), job_of(base)
                spec = MergeSpec(
                    name="merge_bench",
                    request=request,
                    job=job,
                    base_model_path=str(base.folder),
                    adapter_paths=adapters[:count],
                    cpu_threads=2,
                )
                found = peak(spec, folder / f"{kind}-{count}")
                told = estimate_combination(job, adapters=count, combination_type=kind).total
                print(f"{kind:22}{count:8}{found / 1e6:7.0f} MB{told / 1e6:8.0f} MB{told / found:7.2f}", flush=True)


if __name__ == "__main__":
    main()
