"""A tuned model as GGUF: `python -m worker.train.to_gguf SPEC OUT`. Same contract as the trainer.

`OUT/product` holds one GGUF file (the merged model, or the adapter alone), a Modelfile, a card and a manifest.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import gguf
import torch
from transformers import AutoModelForCausalLM

from shared.contract.merge_request import CreateExport, MergeSpec
from shared.contract.methods import METHODS
from shared.contract.spec import BaseModelRef
from worker.train.export import library_versions
from worker.train.gguf_adapter import write_adapter
from worker.train.gguf_figures import llama_cpp_name, rope_factors, write_figures
from worker.train.gguf_tensors import FILE_TYPES, GgufTensor, Names, in_numpy, pieces_of, write_tensors
from worker.train.gguf_tokens import write_tokens
from worker.train.merge import merged_model
from worker.train.modelfile import modelfile
from worker.train.product import make_product
from worker.train.tokenizer import load_tokenizer


def export(spec: MergeSpec, folder: Path) -> None:
    """Write the files into `folder`.

    Raises:
        Invalid: `architecture_not_exported`, `tokenizer_not_exported`, `adapter_not_exported`,
            `quantization_too_narrow` or `merge_impossible`; the message says what and the remedy.
    """
    request = spec.request
    assert isinstance(request, CreateExport), request
    quantization = request.settled
    if request.format == "gguf":
        file = folder / f"model-{quantization}.gguf"
        _write_model(spec, request, file)
    else:
        file = folder / f"adapter-{quantization}.gguf"
        write_adapter(spec, request, file)
    (folder / "Modelfile").write_text(modelfile(request, file.name, base=spec.job.base_model), encoding="utf-8")
    (folder / "README.md").write_text(_card(spec, request, file.name), encoding="utf-8")
    (folder / "export_manifest.json").write_text(json.dumps(_manifest(spec), indent=1), encoding="utf-8")


def _write_model(spec: MergeSpec, request: CreateExport, file: Path) -> None:
    tokenizer = load_tokenizer(spec)
    model = _model(spec, request)
    architecture = llama_cpp_name(model.config)
    names = Names(model.config, architecture)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(request.adapter)
    _name_base(writer, spec.job.base_model)
    write_figures(writer, model.config, architecture=architecture)
    writer.add_file_type(FILE_TYPES[request.settled])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_tokens(writer, tokenizer, rows=model.get_input_embeddings().weight.shape[0])
    pieces = list(pieces_of(model, names))
    if (factors := rope_factors(model.config)) is not None:
        pieces.insert(0, GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: in_numpy(factors)))
    write_tensors(writer, pieces, request.settled)


def _model(spec: MergeSpec, request: CreateExport) -> Any:
    """The merged model; of a full fine-tune the model that it is."""
    if not METHODS[spec.job.adapter.method].adapter:
        return AutoModelForCausalLM.from_pretrained(
            spec.adapter_paths[0], dtype="auto", use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    return merged_model(spec, onto=request.onto or "base")


def _name_base(writer: gguf.GGUFWriter, base: BaseModelRef) -> None:
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base.public_name)
    writer.add_base_model_version(0, base.revision)
    if base.source == "hub":
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base.public_name}")


def _manifest(spec: MergeSpec) -> dict[str, Any]:
    return {
        "export": spec.name,
        "request": spec.request.model_dump(mode="json"),
        "base_model": spec.job.base_model.model_dump(mode="json"),
        "libraries": {**library_versions(), "gguf": version("gguf")},
    }


def _card(spec: MergeSpec, request: CreateExport, file: str) -> str:
    base = spec.job.base_model
    whole = request.format == "gguf"
    what = "merged into" if whole else "an adapter for"
    run = f"llama-cli -m {file}" if whole else f"llama-cli -m BASE.gguf --lora {file}"
    return f"""---
base_model: {json.dumps(base.public_name)}
base_model_relation: {"quantized" if whole else "adapter"}
library_name: gguf
pipeline_tag: text-generation
---
# {request.adapter}

{request.adapter}, {what} {base.public_name} (revision `{base.revision}`), as GGUF ({request.settled}).
`export_manifest.json` holds the request and the library versions.

```sh
{run}
ollama create my-model -f Modelfile
```
"""


if __name__ == "__main__":
    light_start.end()
    torch.set_grad_enabled(mode=False)
    sys.exit(make_product(export, spec_file=Path(sys.argv[1]), out=Path(sys.argv[2])))
