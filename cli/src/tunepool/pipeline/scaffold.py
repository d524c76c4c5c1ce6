"""`tunepool init`: writes a pipeline for a folder of data, and says what it chose and why. Nothing is overwritten."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer
import yaml

from tunepool import native
from tunepool.pipeline.looking import LEAST_TRAINED, Data, RowsSummary, data_of, is_held_out, numbered
from tunepool.printing import json_line, printable
from tunepool.requests import BadSetting

Ci = Literal["github", "gitlab", "jenkins", "none"]
# Where it lies in a repository, or where there is such a file already; and what it is made of.
CI_FILES: Final[dict[str, tuple[str, str, str]]] = {
    "github": (".github/workflows/tunepool.yml", ".github/workflows/tunepool.yml", "github.yml"),
    "gitlab": (".gitlab-ci.yml", ".gitlab-ci.tunepool.yml", "gitlab.yml"),
    "jenkins": ("Jenkinsfile", "Jenkinsfile.tunepool", "Jenkinsfile"),
}
BESIDE: Final = {
    ".gitlab-ci.tunepool.yml": "add to .gitlab-ci.yml: include: {local: .gitlab-ci.tunepool.yml}",
    "Jenkinsfile.tunepool": "a Jenkinsfile is there; name this one as the script path of a further pipeline",
}
ENOUGH_FOR_INTERVALS: Final = 30


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    subject: str
    value: str
    reason: str


@dataclass(frozen=True)
class HeldOut:
    """The files of a pipeline's rows, and how many are held out. `made`: by splitting `training`'s source."""

    training: str
    held_out: str
    rows: int
    made: dict[Path, list[bytes]]


def init(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A folder with training data.")] = Path(),
    model: Annotated[str | None, typer.Option(help="Base model; none: the server's first that is ready.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the pipeline and its alias; none: the folder's.")] = None,
    share: Annotated[float, typer.Option(min=0.01, max=0.5, help="Of the rows to hold out for the evaluation.")] = 0.1,
    ci: Annotated[Ci | None, typer.Option(help="Which CI system; none named: what the repository shows.")] = None,
) -> None:
    """Look at a folder of data and write pipeline.yaml, gate.yaml, a held-out split and a CI file for it."""
    data = data_of(folder)
    base = Choice("model", model, "as you said") if model else _base_of_the_server(context)
    root = _repository(folder)
    system = Choice("ci", ci, "as you said") if ci else _ci_of(root)
    called = name or re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name).strip("-._")[:60] or "pipeline"
    held = _held_out(data, share)
    planned = dict(held.made)
    planned[folder / "pipeline.yaml"] = [_pipeline(called, base.value, data.training, held).encode()]
    planned[folder / "gate.yaml"] = [_gate(data.training, held).encode()]
    if system.value != "none":
        place, text = _ci_file(system.value, root, folder, held)
        planned[place] = [text.encode()]
    _write(planned)
    choices = [*_choices(data, held, share), base, system]
    if context.obj.as_json:
        written = [str(path) for path in planned]
        print(json_line({"written": written, "choices": [vars(choice) for choice in choices]}))
        return
    for choice in choices:
        print(printable(f"{choice.subject:9} {choice.value}: {choice.reason}"))
    for path in planned:
        remark = f" ({BESIDE[path.name]})" if path.name in BESIDE else ""
        print(printable(f"wrote     {path}{remark}"))
    print(printable(f"next      tunepool run {folder / 'pipeline.yaml'}"))


def _write(planned: dict[Path, list[bytes]]) -> None:
    """All files or, where any is there already, none. Raises BadSetting."""
    there = [path for path in planned if path.exists() or path.is_symlink()]
    if there:
        raise BadSetting(f"{there[0]} is there already, and nothing was written. Move it away, or edit it by hand.")
    for path, parts in planned.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:  # never over another's
            file.writelines(parts)


# --- what was chosen -------------------------------------------------------------------------------------------------


def _choices(data: Data, held: HeldOut, share: float) -> Iterator[Choice]:
    rows = data.training
    others = f"; passed over: {', '.join(path.name for path in data.passed_over)}" if data.passed_over else ""
    yield Choice("data", rows.path.name, f"the largest file of rows: {rows.rows} of the form {rows.shape}{others}")
    yield Choice("method", rows.method, f"what rows of the form {rows.shape} are for")
    if data.held_out is None:
        why = f"{held.rows} rows by hash, {share:.0%} asked for: a row stays on its side when others come or go"
    else:
        why = f"{held.rows} rows that were there, and that no split is made of"
    yield Choice("held out", held.held_out, why)
    yield Choice("measures", ", ".join(measure["name"] for measure in _measures(rows)), _why_measures(rows))


def _why_measures(rows: RowsSummary) -> str:
    if rows.method != "supervised" or not rows.answered:
        return "the rows have no single right answer"
    words = ["the loss always"]
    words += ["exact matches because answers are short"] if rows.mostly(rows.short) else []
    words += ["valid JSON because answers are JSON"] if rows.mostly(rows.jsons) else []
    return ", ".join(words)


def _base_of_the_server(context: typer.Context) -> Choice:
    """Raises BadSetting, NoServerKnown."""
    ready = [entry["id"] for entry in native.get(context, "models")["data"] if entry["state"] == "ready"]
    if not ready:
        raise BadSetting("The server has no base model that is ready; name one with --model.")
    return Choice("model", ready[0], f"the first of {len(ready)} that the server has ready; --model for another")


def _repository(folder: Path) -> Path:
    """The top of the git repository around a folder, else the folder."""
    top = next((path for path in (folder.resolve(), *folder.resolve().parents) if (path / ".git").exists()), None)
    return top or folder.resolve()


def _ci_of(root: Path) -> Choice:
    for system, mark in (("github", ".github"), ("gitlab", ".gitlab-ci.yml"), ("jenkins", "Jenkinsfile")):
        if (root / mark).exists():
            return Choice("ci", system, f"the repository has {mark}")
    remotes = _remotes(root)
    for system in ("github", "gitlab"):
        if system in remotes:
            return Choice("ci", system, "the repository's remote says so")
    return Choice("ci", "none", "nothing in the repository says which; name one with --ci")


def _remotes(root: Path) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "remote", "-v"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


# --- the held-out rows -----------------------------------------------------------------------------------------------


def _held_out(data: Data, share: float) -> HeldOut:
    """Raises BadSetting when a split leaves too few rows."""
    source = data.training.path
    if data.held_out is not None:
        _enough(data.training.rows, data.held_out.rows, source)
        return HeldOut(source.name, data.held_out.path.name, data.held_out.rows, {})
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for _, line in numbered(source):
        sides[is_held_out(line, share)].append(line.rstrip(b"\r\n") + b"\n")
    trained, held = sides
    _enough(len(trained), len(held), source)
    names = [source.with_name(f"{source.stem}.{side}.jsonl") for side in ("train", "heldout")]
    return HeldOut(names[0].name, names[1].name, len(held), dict(zip(names, sides, strict=True)))


def _enough(trained: int, held: int, source: Path) -> None:
    if trained < LEAST_TRAINED or held < 1:
        raise BadSetting(
            f"{source}: {trained} rows would be trained on and {held} held out; at least {LEAST_TRAINED} and 1 are "
            "needed. Bring more rows, or another --share."
        )


# --- the files -------------------------------------------------------------------------------------------------------


def _measures(rows: RowsSummary) -> list[dict[str, Any]]:
    measures = [{"type": "loss", "name": "loss"}]
    if rows.method == "supervised":
        measures += [{"type": "exact_match", "name": "exact_match"}] if rows.mostly(rows.short) else []
        measures += [{"type": "json_valid", "name": "valid_json"}] if rows.mostly(rows.jsons) else []
    return measures


def _pipeline(name: str, model: str, rows: RowsSummary, held: HeldOut) -> str:
    document = {
        "name": name,
        "training": held.training,
        "model": model,
        **({} if rows.method == "supervised" else {"method": rows.method}),
        "evaluate": {"items": {"file": held.held_out}, "measures": _measures(rows), "forgetting": True},
        "gate": "gate.yaml",
        "promote": f"{name}@prod",
    }
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    return f"# Every key: tunepool run --schema. Runs with: tunepool run pipeline.yaml\n{text}"


def _gate(rows: RowsSummary, held: HeldOut) -> str:
    """Better than the base, no worse than what is in production, and nothing forgotten."""
    measured = {measure["name"] for measure in _measures(rows)}
    better: dict[str, Any] = {"assert": "candidate.loss < base.loss", "title": "better than the base model"}
    better |= {"confidently": True} if held.rows >= ENOUGH_FOR_INTERVALS else {}
    against = (
        "candidate.exact_match >= prod.exact_match - 0.01"
        if "exact_match" in measured
        else "candidate.loss <= prod.loss * 1.01"
    )
    assertions: list[dict[str, Any]] = [
        better,
        {"assert": against, "title": "no worse than what is in production", "if_present": "prod"},
        {
            "assert": "candidate.forgetting.loss <= base.forgetting.loss * 1.05",
            "title": "general questions are answered as before",
        },
    ]
    if "valid_json" in measured:
        assertions.append({"assert": "candidate.valid_json >= 0.99", "title": "answers are JSON"})
    text = yaml.safe_dump({"assertions": assertions}, sort_keys=False, width=120)
    return f"# What an evaluation must show before the alias moves; tunepool gate schema.\n{text}"


_NAMES: Final = re.compile(r"\b(train\.jsonl|heldout\.jsonl|pipeline\.yaml|gate\.yaml)\b")


def _ci_file(system: str, root: Path, folder: Path, held: HeldOut) -> tuple[Path, str]:
    """(where it belongs, its text): the example of that system with this folder's names."""
    usual, beside, source = CI_FILES[system]
    where = beside if (root / usual).exists() else usual
    below = folder.resolve().relative_to(root).as_posix()
    prefix = "" if below == "." else f"{below}/"
    if re.search(r"[^A-Za-z0-9_./-]", prefix + held.training + held.held_out):
        raise BadSetting(f"'{prefix}{held.training}' has characters that a CI file would have to quote; rename it.")
    names = {"train.jsonl": held.training, "heldout.jsonl": held.held_out}
    text = (files("tunepool.pipeline") / "ci" / source).read_text(encoding="utf-8")
    return root / where, _NAMES.sub(lambda match: prefix + names.get(match[0], match[0]), text)
