"""A published model as GGUF, in each format: `python bench/gguf_export.py [FOLDER] [--formats f16 q4_k_m]`.

FOLDER holds the base model; the demo model if left out. Lays a small random adapter over the base, exports the merged
model, and prints for each format: MiB, seconds, how far the logits are off when transformers reads the file back (as a
part of their spread), its perplexity over some rows of prose beside the tuned model's own, how many of the greedy next
tokens of a text are the same, and whether llama.cpp (xllamacpp) cuts the text into as many tokens and goes on with the
text that transformers goes on with. The merged weights have the base's own number format, so f32 is off by its
rounding.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from bench.machine import header
from examples.stack import server_command
from shared.contract.merge_request import CreateExport
from tests.train.test_merging import make_merge_spec
from worker.train.product import make_product
from worker.train.to_gguf import export

MODEL = "smollm2-135m-instruct"
FORMATS = ("f32", "f16", "q8_0", "q5_0", "q4_0", "q4_k_m")
TEXT = "The lighthouse keeper climbed the stairs, lit the lamp, and looked out over the sea. The storm"
TOKENS = 16
# Prose that nobody wrote for this: pages of our own documentation, in rows of so many tokens.
PROSE = ("lifecycle.md", "scheduling.md", "evaluation.md")
ROWS, ROW_TOKENS = 12, 256


def adapter_on(base: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(load(base), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options).eval()


def rows_of(words: Any) -> torch.Tensor:
    pages = Path(__file__).resolve().parent.parent / "docs"
    text = "\n".join((pages / name).read_text(encoding="utf-8") for name in PROSE)
    tokens = words(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return tokens[: ROWS * ROW_TOKENS].reshape(ROWS, ROW_TOKENS)


def perplexity(model: Any, rows: torch.Tensor) -> float:
    """Of all tokens but the first of each row, given those before them."""
    losses = [model(input_ids=row[None], labels=row[None]).loss for row in rows]
    return float(torch.stack(losses).mean().exp())


def made(folder: Path, base: Path, adapter: Path, quantization: str) -> Path:
    folder.mkdir()
    wanted = CreateExport(adapter="ft:published", format="gguf", quantization=quantization)  # type: ignore[arg-type]
    spec = make_merge_spec(folder, base=base, adapters=[adapter], request=wanted)
    code = make_product(export, spec_file=spec, out=folder / "out")
    if code != 0:
        raise SystemExit((folder / "out" / "events.jsonl").read_text(encoding="utf-8"))
    return folder / "out" / "product" / f"model-{quantization}.gguf"


def of_llama_cpp(file: Path) -> tuple[int, str]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 256, 1, False
    server = xllamacpp.Server(settings)
    answer = server.handle_completions({"prompt": TEXT, "max_tokens": TOKENS, "temperature": 0, "top_k": 1})
    return answer["usage"]["prompt_tokens"], answer["choices"][0]["text"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    arguments = parser.parse_args()
    print(header(), flush=True)
    base = arguments.base or Path(server_command("models", "path", MODEL, home=Path(".tunepool")))
    words = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    asked = words(TEXT, return_tensors="pt", add_special_tokens=False)
    with tempfile.TemporaryDirectory() as folder:
        adapter = adapter_on(base, Path(folder) / "adapter")
        tuned = PeftModel.from_pretrained(load(base), adapter).eval()
        expected, rows = tuned(**asked).logits, rows_of(words)
        own = perplexity(tuned, rows)
        print(json.dumps({"format": "tuned, float32", "perplexity": round(own, 3), "tokens": rows.numel()}), flush=True)
        del tuned
        for quantization in arguments.formats:
            begun = time.perf_counter()
            file = made(Path(folder) / quantization, base, adapter, quantization)
            seconds = time.perf_counter() - begun
            options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
            back = load(file.parent, **options)
            answer = back(**asked).logits
            tokens = back.generate(**asked, max_new_tokens=TOKENS, do_sample=False)[0, asked.input_ids.shape[1] :]
            count, text = of_llama_cpp(file)
            told_perplexity = perplexity(back, rows)
            same = (answer.argmax(-1) == expected.argmax(-1)).float().mean()
            told = {
                "format": quantization,
                "mib": round(file.stat().st_size / 2**20),
                "seconds": round(seconds, 1),
                "logits_off": round(float((answer - expected).std() / expected.std()), 4),
                "perplexity": round(told_perplexity, 3),
                "perplexity_off": f"{100 * (told_perplexity / own - 1):+.2f} %",
                "next_tokens_same": round(float(same), 2),
                "llama_cpp_tokens": f"{count} of {asked.input_ids.shape[1]}",
                "llama_cpp_same_text": text == words.decode(tokens, skip_special_tokens=True),
            }
            print(json.dumps(told), flush=True)
            file.unlink()


if __name__ == "__main__":
    main()
