"""Resumable state on disk: folders that are complete only when renamed into place, with a manifest of hashes.

`checkpoints/step-00000042/`
    adapter/            a plain PEFT directory (or a plain model directory, when every weight trains)
    state.safetensors   trained weights, optimizer tensors, random generators
    state.json          everything of these that is not a tensor, and the progress of the run
    manifest.json       {format, step, job_id, files: [{name, bytes, sha256}]}, written last

Nothing is ever pickled, and nothing is resumed whose hashes differ.

A checkpoint is made in two acts: what changes with the next step is copied at once (`taken`), and the copy is hashed
and brought to the disk (`Taken.written`), which other threads may do while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from worker.train.methods import trainable
from worker.train.random_state import RandomState
from worker.train.ranks import Ranks

JsonObject = dict[str, Any]

FORMAT = 2  # of state.json and state.safetensors; a checkpoint of another format is passed over, not misread


@dataclass
class Progress:
    """How far the run is. Everything a resumed attempt must know besides tensors."""

    step: int = 0  # optimizer steps done
    looked_step: int = 0  # the last step after which the validation rows were looked at
    trained_tokens: int = 0
    train_seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None  # the lowest; that of `best_step` unless answers choose
    best_score: float | None = None  # where answers choose: their mean at `best_step`, and the loss there
    best_score_loss: float | None = None
    evaluations_without_gain: int = 0
    first_losses: list[float] = field(default_factory=list)  # what a diverging loss is held against
    high_losses: int = 0
    early_stopped: bool = False


@dataclass(frozen=True)
class TrainingState:
    """What changes while training: the objects whose state a checkpoint holds."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None  # of losses in float16


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Taken:
    """A checkpoint that no further step changes, not yet complete on the disk. Only the first rank has its content."""

    place: Path
    job_id: str
    tensors: dict[str, torch.Tensor]
    state: JsonObject

    def written(self) -> Path:
        """Complete it; a power cut leaves all of it or none. An existing one of the same step is replaced."""
        unfinished = _unfinished(self.place)
        save_file(self.tensors, unfinished / "state.safetensors")
        (unfinished / "state.json").write_text(json.dumps(self.state), encoding="utf-8")
        files = [describe(file, root=unfinished) for file in sorted(unfinished.rglob("*")) if file.is_file()]
        manifest = {"format": FORMAT, "step": self.state["progress"]["step"], "job_id": self.job_id, "files": files}
        (unfinished / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        settle(unfinished, place=self.place)
        return self.place


def taken(
    folder: Path,
    *,
    learner: TrainingState,
    progress: Progress,
    job_id: str,
    write_adapter: Callable[[Path], None],
    ranks: Ranks,
) -> Taken | None:
    """Copy all that a checkpoint of `progress.step` in `folder` holds, with every rank's random generators.

    The adapter is a folder beside that place already: upstream reads its weights from the model.

    Returns:
        None on all ranks but the first one, which writes it.
    """
    place = folder / folder_name(progress.step)
    tensors, facts = _state(learner, ranks)
    if not ranks.first:
        return None
    unfinished = _unfinished(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    write_adapter(unfinished / "adapter")
    return Taken(place, job_id, tensors, {"progress": asdict(progress), **facts})


def _unfinished(place: Path) -> Path:
    return place.with_suffix(".tmp")


def settle(unfinished: Path, *, place: Path) -> None:
    """Flush everything in `unfinished` to the disk, then give it its name, in place of what had it."""
    for path in [*unfinished.rglob("*"), unfinished]:
        _flush(path)
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)
    _flush(place.parent)


def describe(file: Path, *, root: Path) -> JsonObject:
    """One line of a manifest."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"name": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": digest}


def newest_intact(folder: Path, *, job_id: str) -> Path | None:
    """The newest checkpoint of this job whose files are what its manifest says; broken ones are passed over."""
    return next((place for place in reversed(_places(folder)) if is_intact(place, job_id=job_id)), None)


def is_intact(place: Path, *, job_id: str) -> bool:
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
        expected = [(entry["name"], entry["bytes"], entry["sha256"]) for entry in manifest["files"]]
        kind = (manifest["format"], manifest["job_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = [place / name for name, _, _ in expected]
    inside = all(file.resolve().is_relative_to(place.resolve()) and file.is_file() for file in files)
    if kind != (FORMAT, job_id) or not inside:
        return False
    return [tuple(describe(file, root=place).values()) for file in files] == expected


def prune(folder: Path, *, keep_steps: set[int | None]) -> None:
    """Remove all checkpoints but the newest two and those of `keep_steps`."""
    for place in _places(folder)[:-2]:
        if int(place.name.removeprefix("step-")) not in keep_steps:
            shutil.rmtree(place)


def _places(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("step-*") if place.suffix != ".tmp" and place.is_dir())


def read_progress(place: Path) -> Progress:
    """The progress of a checkpoint; what only a newer version notes is left out."""
    noted = json.loads((place / "state.json").read_text(encoding="utf-8"))["progress"]
    return Progress(**{field.name: noted[field.name] for field in fields(Progress) if field.name in noted})


def restore(place: Path, learner: TrainingState, *, rank: int = 0) -> None:
    """Put weights, optimizer, scheduler and this rank's random generators back as they were. `place` must be intact."""
    tensors = load_file(place / "state.safetensors")
    facts = json.loads((place / "state.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        for name, parameter in trainable(learner.model).items():
            parameter.copy_(tensors[f"weight.{name}"])
    learner.optimizer.load_state_dict(_for_this_device(_tree_with_tensors(facts["optimizer"], tensors), learner))
    learner.scheduler.load_state_dict(_tree_with_tensors(facts["scheduler"], tensors))
    if learner.scaler is not None and facts.get("scaler"):  # a version before this one noted none
        learner.scaler.load_state_dict(facts["scaler"])
    own = f"random.{rank}."
    mine = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
    RandomState(mine, facts["random"][rank]).put_back()


def _for_this_device(saved: JsonObject, learner: TrainingState) -> JsonObject:
    """An optimizer's state, with the kernels that this attempt's device has and not those of the one before."""
    for group, now in zip(saved["param_groups"], learner.optimizer.param_groups, strict=True):
        group.update({name: now[name] for name in ("fused", "foreach") if name in now})
    return saved


def _state(learner: TrainingState, ranks: Ranks) -> tuple[dict[str, torch.Tensor], JsonObject]:
    tensors = {f"weight.{name}": parameter for name, parameter in trainable(learner.model).items()}
    optimizer = _without_tensors(learner.optimizer.state_dict(), tensors, path="optimizer")
    scheduler = _without_tensors(learner.scheduler.state_dict(), tensors, path="scheduler")
    random_states = ranks.gathered(RandomState.taken())
    tensors |= {
        f"random.{rank}.{name}": value
        for rank, each in enumerate(random_states)
        for name, value in each.tensors.items()
    }
    # safetensors refuses tensors that share memory (bitsandbytes' quantile maps do): each gets its own copy.
    alone = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return alone, {
        "optimizer": optimizer,
        "scheduler": scheduler,
        "scaler": None if learner.scaler is None else learner.scaler.state_dict(),
        "random": [each.facts for each in random_states],
    }


# An optimizer's state is a tree of dicts and lists; tensors move to the tensor file and leave their name behind.
_TENSOR = "__tensor__"


def _without_tensors(tree: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    if isinstance(tree, torch.Tensor):
        tensors[path] = tree
        return {_TENSOR: path}
    if isinstance(tree, dict):
        # Keys are parameter numbers or names; JSON knows only names, so the pair list keeps which is which.
        return {"pairs": [[key, _without_tensors(value, tensors, f"{path}.{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return [_without_tensors(value, tensors, f"{path}.{place}") for place, value in enumerate(tree)]
    return tree


def _tree_with_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, dict) and _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if isinstance(tree, dict):
        return {key: _tree_with_tensors(value, tensors) for key, value in tree["pairs"]}
    if isinstance(tree, list):
        return [_tree_with_tensors(value, tensors) for value in tree]
    return tree


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
