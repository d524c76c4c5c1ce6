"""Describes a base model without its weights: `python -m worker.train.description SPEC OUT`.

What its chat template writes, and how transformers builds it from its config.json: on torch's `meta` device, where
tensors have shapes and no memory. Writes `OUT/description.json`. A fact that cannot be learnt is a note in it, never a
failure.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from worker.train import light_start

if __name__ == "__main__":
    light_start.begin()

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shared.contract.base_facts import LayerKind
from shared.contract.events import EXIT_DONE, TemplateAbilities
from shared.contract.model_description import DescriptionSpec, ExpertKind, ModelBuild, ModelDescription
from shared.contract.modules import last
from worker.train.chat import ChatTemplate
from worker.train.targets import adaptable, expert_stacks, linear_modules, parts_beside
from worker.train.template_abilities import abilities
from worker.train.tokenizer import generation_ends, load_tokenizer_of

_CHARACTERS = 300


def main(spec_file: Path, out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    spec = DescriptionSpec.model_validate_json(spec_file.read_bytes())
    (out / "description.json").write_text(describe(Path(spec.folder)).model_dump_json(), encoding="utf-8")
    return EXIT_DONE


def describe(folder: Path) -> ModelDescription:
    """Both parts; of a part that its libraries cannot read, the reason."""
    made = ModelDescription()
    try:
        made = made.model_copy(update={"build": built(folder)})
    except Exception as error:  # noqa: BLE001  # whatever an architecture's code raises on a stranger's config
        made = made.model_copy(update={"notes": [f"The model cannot be built from its config.json: {_line(error)}"]})
    try:
        template, digest = asked(folder)
    except Exception as error:  # noqa: BLE001  # a stranger's template and tokenizer
        note = f"Its chat template cannot be asked: {_line(error)}"
        return made.model_copy(update={"notes": [*made.notes, note]})
    return made.model_copy(update={"template": template, "template_sha256": digest})


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:_CHARACTERS]


def asked(folder: Path) -> tuple[TemplateAbilities | None, str | None]:
    """What the chat template writes, and its sha256; None without one."""
    if not any(folder.glob("tokenizer*")):
        return None, None
    tokenizer = load_tokenizer_of(str(folder))
    text = tokenizer.chat_template
    if not isinstance(text, str):
        return None, None
    ends = generation_ends(tokenizer, folder)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return abilities(ChatTemplate(tokenizer, stops=ends), stops=ends), digest


def built(folder: Path) -> ModelBuild:
    """The model of `folder`/config.json, without memory for its weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    fine = adaptable(model)
    shapes = Counter((last(path), *_shape(module), path in fine) for path, module in linear_modules(model).items())
    stacks = Counter((last(path), tuple(shape)) for path, shape in expert_stacks(model).items())
    return ModelBuild(
        model_class=type(model).__name__,
        parameters=sum(tensor.numel() for tensor in model.parameters()),
        tied=_tied(model),
        layer_types=_layer_types(model),
        linear=[
            LayerKind(name=name, inputs=inputs, outputs=outputs, count=count, adapted=adapted)
            for (name, inputs, outputs, adapted), count in sorted(shapes.items())
        ],
        experts=[ExpertKind(name=name, shape=list(shape), count=count) for (name, shape), count in stacks.items()],
        beside=parts_beside(model),
    )


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, torch.nn.Linear) else (first, second)  # Conv1D keeps it transposed


def _tied(model: Any) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _layer_types(model: Any) -> dict[str, int]:
    """As the config of the language model lists them; else by the classes of its layers."""
    listed = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    if listed:
        return dict(Counter(str(kind) for kind in listed))
    lists = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList)]
    longest = max(lists, key=len, default=torch.nn.ModuleList())
    return dict(Counter(type(layer).__name__ for layer in longest))


if __name__ == "__main__":
    light_start.end()
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
