"""What the trainer makes of each family of base models: `python bench/families.py [--markdown] [family …]`.

For each family a tiny random model is made from its config and goes the whole way: the trainer in this process, a plain
PEFT load of its product, and a merge. A line tells what was seen, or the sentence that refuses it. `--markdown` prints
the page docs/families.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared.contract.events import EXIT_DONE, TrainerEvent
from shared.contract.families import WHOLE_ONLY, WHOLE_ONLY_REASON
from shared.contract.merge_request import CreateMerge, MergeSpec
from shared.contract.spec import AttemptSpec
from shared.settle.model_facts import facts_of
from tests.train.families import FAMILIES, WRAPPERS, make_family
from tests.train.tiny import chat_rows, losses, make_spec, read_events, run
from worker.train import export, row_attention
from worker.train.data import TokenRow
from worker.train.merge import merge
from worker.train.objectives.supervised import packed, row_starts
from worker.train.product import make_product

SAME: Final = 1e-5  # of float32 arithmetic, as a part of the largest of the figures compared
EVERY: Final = tuple(sorted(FAMILIES | WRAPPERS))


@dataclass(frozen=True)
class Seen:
    """What became of one family. A difference is a part of the largest logit; 0 is equal to the bit."""

    family: str
    architecture: str
    first_loss: float | None = None
    last_loss: float | None = None
    valid_loss: float | None = None
    packed: float | None = None  # None: packing is off, and `packing_off` says why
    packing_off: str = ""
    four_bit: bool | None = None  # it learns on a 4-bit base, too; None: that is refused, and the next says why
    four_bit_refused: str = ""
    loaded: float | None = None
    merged: float | None = None
    refused: str = ""
    notes: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        """It is right throughout, or refused by a sentence."""
        if self.refused:
            return True
        differences = (self.loaded, self.merged, 0.0 if self.packing_off else self.packed)
        return (
            self.learns
            and self.four_bit is not False
            and all(seen is not None and seen <= SAME for seen in differences)
        )

    @property
    def learns(self) -> bool:
        figures = (self.first_loss, self.last_loss)
        return None not in figures and self.last_loss < self.first_loss - 0.1 and self.valid_loss is not None


def look(family: str, folder: Path, **adapter_options: Any) -> Seen:
    """Take one family the whole way in `folder`; the options are those of the job's adapter."""
    base = make_family(folder, family)
    architecture = _architecture(base)
    trained = _train(folder / "lora", base, method="lora", **adapter_options)
    if trained is None:
        return Seen(family, architecture, refused=_refusal(folder / "lora" / "out"))
    adapter = folder / "lora" / "out" / "adapter"
    # The submit refuses it (shared/settle/base_refusals.py), so the trainer is not asked.
    refused = f"{WHOLE_ONLY_REASON}; use method lora" if architecture in WHOLE_ONLY else ""
    four_bit = None if refused else _train(folder / "qlora", base, method="qlora", **adapter_options)
    curve = losses(trained.events)
    off = next((note for note in trained.notes if note.startswith("Packing is off")), "")
    return Seen(
        family,
        architecture,
        first_loss=curve[1],
        last_loss=curve[max(curve)],
        valid_loss=next(event.valid_loss for event in reversed(trained.events) if event.type == "validation"),
        packed=trained.packed,
        packing_off=off,
        four_bit=None if four_bit is None else _falls(losses(four_bit.events)),
        four_bit_refused="" if four_bit else refused or _refusal(folder / "qlora" / "out"),
        loaded=_apart(_logits(PeftModel.from_pretrained(_plain(base), str(adapter))), trained.logits),
        merged=_apart(_logits(_plain(_merged(folder, base, adapter))), trained.logits),
        notes=tuple(note for note in trained.notes if note != off),
    )


@dataclass(frozen=True)
class Trained:
    """A run that ended well, and what its model computed when its weights were last written."""

    events: list[TrainerEvent]
    logits: torch.Tensor
    packed: float | None

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(event.message for event in self.events if event.type == "message")


def _train(folder: Path, base: Path, *, method: str, **options: Any) -> Trained | None:
    """Train a tiny job, packed where the trainer packs; None if it was refused."""
    settings = {"packing": True, "publish": "last", "learning_rate": 0.02}
    adapter = {"method": method, "r": 8, **options}
    rows = {"rows": chat_rows(8), "validation": chat_rows(4)}
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    facts = facts_of(config, name=base.name).model_dump()
    spec = make_spec(folder, model=base, adapter=adapter, training=settings, facts=facts, **rows)
    kept: list[tuple[torch.Tensor, float | None]] = []
    write = export.write_weights

    def write_and_ask(model: Any, place: Path, *, spec: AttemptSpec, **options: Any) -> None:
        write(model, place, spec=spec, **options)
        kept[:] = [(_logits(model), _packed_against_alone(model) if spec.job.training.packing else None)]

    with patch.object(export, "write_weights", write_and_ask):
        code, events = run(spec, folder / "out")
    return Trained(events, *kept[0]) if code == EXIT_DONE else None


@torch.no_grad()
def _packed_against_alone(model: Any) -> float:
    """By how much the logits of three packed rows leave those of each row alone, by the road that training takes."""
    rows = [TokenRow(np.arange(size) * 7 % 250 + 4, np.ones(size, dtype=np.bool_)) for size in (5, 11, 8)]
    trains = model.training
    model.eval()
    apart = torch.cat([_read(model, [row]) for row in rows], dim=1)
    together = _read(model, rows)
    model.train(trains)
    return _apart(together, apart)


def _read(model: Any, rows: Sequence[TokenRow]) -> torch.Tensor:
    reads = {name: value for name, value in packed(rows).inputs.items() if name != "labels"}
    if model.config._attn_implementation == row_attention.NAME:
        reads[row_attention.ROW_STARTS] = row_starts(reads["position_ids"])
    logits: torch.Tensor = model(**reads, use_cache=False).logits.float()
    return logits


def _merged(folder: Path, base: Path, adapter: Path) -> Path:
    job = AttemptSpec.model_validate_json((folder / "lora" / "spec.json").read_bytes()).job
    request = CreateMerge(adapter="ft:tiny", onto="base")
    spec = MergeSpec(name="merge", request=request, job=job, base_model_path=str(base), adapter_paths=[str(adapter)])
    file = folder / "merge.json"
    file.write_text(spec.model_dump_json(), encoding="utf-8")
    code = make_product(merge, spec_file=file, out=folder / "merged")
    if code != EXIT_DONE:
        raise RuntimeError(f"the merge ended with {code}: {_refusal(folder / 'merged')}")
    return folder / "merged" / "product"


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False, local_files_only=True
    )


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    """Logits (1, 24, vocabulary) of known tokens, in eval mode; the model's own mode is restored."""
    trains = model.training
    ids = torch.arange(24)[None] * 7 % 250 + 4
    logits: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    model.train(trains)
    return logits


def _apart(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


def _falls(curve: dict[int, float]) -> bool:
    return curve[max(curve)] < curve[1] - 0.1


def _refusal(out: Path) -> str:
    return next((event.message for event in read_events(out) if event.type == "failed"), "no sentence")


def _architecture(base: Path) -> str:
    return str(re.search(r'"architectures": \[\s*"(\w+)"', (base / "config.json").read_text(encoding="utf-8"))[1])  # type: ignore[index]


# ---- Printing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries' remarks on tiny models, which say nothing of the family."""
    logging.disable(logging.WARNING)
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def look_safely(family: str) -> Seen:
    """A crash is a finding, too."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        try:
            return look(family, Path(folder))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the other families are looked at
            return Seen(family, "", notes=(f"CRASH {type(error).__name__}: {str(error)[:300]}",))


def as_line(seen: Seen) -> str:
    """One family for people who run this."""
    if seen.first_loss is None:
        return f"{seen.family:18} {seen.refused or seen.notes[0]}"
    packed = seen.packing_off or f"packed {seen.packed:.0e}"
    figures = f"{seen.first_loss:.2f} → {seen.last_loss:.2f}, valid {seen.valid_loss:.2f}"
    products = f"4 bit {seen.four_bit}{seen.four_bit_refused}, PEFT {seen.loaded:.0e}, merged {seen.merged:.0e}"
    return f"{seen.family:18} {'right' if seen.right else 'WRONG'} {figures}, {products}, {packed} {seen.notes}"


PAGE: Final = """# Families of base models

Generated by `python bench/families.py --markdown`. Each family was seen as a tiny random model of its own class, on a
CPU in float32, with transformers {transformers} and PEFT {peft}. No published weights were used, and no GPU.

- **loss**: training loss at the first and the last of four steps with `lora`.
- **4 bits**: the loss falls with `qlora` too. On a CPU; bitsandbytes' kernels for GPUs were not run.
- **packed**: by how much the logits of three packed rows leave those of each row alone, as a part of the largest logit;
  or why packing is off. Up to {same:.0e} counts as equal.
- **plain PEFT**, **merged**: the same for the adapter loaded by PEFT alone, and for the merged model.

Validation, checkpoint and save ran in every line. Experts and parts for images stay frozen unless asked for
([methods.md](methods.md)). A family that is not listed is inspected by the trainer: it trains, or ends with a sentence.

| family | class | loss | 4 bits | packed | plain PEFT | merged |
|---|---|---|---|---|---|---|
"""
_OFF: Final = re.compile(r"Packing is off: packed rows would leak into each other:? ?")


def as_row(seen: Seen) -> str:
    """One family as a line of the page."""
    if seen.first_loss is None:
        return f"| {seen.family} | {seen.architecture} | {seen.refused or seen.notes[0]} | | | | |"
    packed = f"off: {_OFF.sub('', seen.packing_off).rstrip('.')}" if seen.packing_off else f"{seen.packed:.0e}"
    four_bit = {True: "yes", False: "no", None: f"refused: {seen.four_bit_refused}".rstrip(".")}[seen.four_bit]
    loss = f"{seen.first_loss:.2f} → {seen.last_loss:.2f}"
    wrong = "" if seen.right else " **wrong**"
    columns = (
        seen.family + wrong,
        seen.architecture,
        loss,
        four_bit,
        packed,
        f"{seen.loaded:.0e}",
        f"{seen.merged:.0e}",
    )
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[], metavar="family", help=", ".join(EVERY))
    parser.add_argument("--markdown", action="store_true", help="print the page docs/families.md")
    options = parser.parse_args()
    if options.markdown:
        versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
        print(PAGE.format(same=SAME, **versions), end="")
    show = as_row if options.markdown else as_line
    for family in options.families or EVERY:
        print(show(look_safely(family)), flush=True)


if __name__ == "__main__":
    main()
