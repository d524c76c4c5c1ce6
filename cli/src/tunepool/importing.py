"""`tunepool import openai`: submits here the jobs that ran at OpenAI. It shows its plan; `--apply` carries it out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tunepool import official, openai_export, requests
from tunepool.openai_export import DataFolder, ExportedJob, Unusable
from tunepool.printing import json_line, printable

if TYPE_CHECKING:
    from openai import OpenAI

import_cli = typer.Typer(no_args_is_help=True, help="Take over what another service listed.")

IMPORTED_FROM: Final = "imported_from"
_EXIT_INCOMPLETE: Final = 1
_EXIT_REFUSED: Final = 4
# What says that this job or file is at fault. Anything else (the key, the limits, the server) is at fault for all.
_REFUSALS: Final = frozenset({400, 404, 409, 413, 415, 422})
_STAYS: Final = (
    "The weights, checkpoints and result files of OpenAI's jobs stay there: no route gives them out. "
    "Each job trains anew here, on another base model; learning_rate_multiplier scales this server's automatic rate."
)

Outcome = Literal["write", "submit", "written", "submitted", "imported already", "left out", "impossible", "refused"]
_TO_DO: Final = frozenset({"write", "submit"})


@dataclass(frozen=True)
class DataFile:
    """One JSONL file of the export, and where the project has its bytes already."""

    name: str
    path: Path
    sha256: str
    uploaded: str | None


@dataclass
class ImportStep:
    """What becomes of one exported job."""

    job: ExportedJob
    outcome: Outcome
    model: str
    notes: list[str] = field(default_factory=list)
    files: dict[str, DataFile] = field(default_factory=dict)
    made: str | None = None  # the id of the job here, or the path of the request

    def request(self, file_ids: dict[str, str]) -> dict[str, Any]:
        """The body that asks for the job; `file_ids`: sha256 → id here."""
        job = self.job
        return {
            "model": self.model,
            **{param: file_ids[file.sha256] for param, file in self.files.items()},
            **requests.given(suffix=job.suffix, seed=job.seed),
            "method": {"type": job.method, job.method: {"hyperparameters": job.hyperparameters}},
            "metadata": {**job.metadata, IMPORTED_FROM: job.id},
        }


@import_cli.callback()
def _sources() -> None:
    """Take over what another service listed."""


@import_cli.command("openai")
def import_openai(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    jobs: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The list of jobs, as JSON.")],
    files: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Folder of the JSONL files.")],
    model: Annotated[str | None, typer.Option(help="Base model here for all of OpenAI's.")] = None,
    mapped: Annotated[
        list[str] | None, typer.Option("--map", metavar="THEIRS=OURS", help="For one model; may be repeated.")
    ] = None,
    resubmit: Annotated[
        bool, typer.Option("--resubmit", help="Create the jobs; else their requests are written.")
    ] = False,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the requests.")] = Path("imported-jobs"),
    every: Annotated[bool, typer.Option("--all", help="Also jobs that did not succeed at OpenAI.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it. Without, nothing is changed.")] = False,
) -> None:
    """Recreate OpenAI's jobs. Exit 1 when one has no equivalent here, 4 when the server refuses one."""
    exported, more = openai_export.jobs(jobs)
    names = ModelNames(context.obj.client, requests.pairs(mapped or []), model)
    plan = ImportPlan(context.obj.client, DataFolder(files), names, resubmit=resubmit, every=every)
    steps = []
    for step in map(plan.step, exported):
        if apply and step.outcome in _TO_DO:
            _carry_out(context.obj.client, step, plan.uploaded, out)
        _show(step, plan.uploaded, as_json=context.obj.as_json)
        steps.append(step)
    notes = [*(["The list says that more jobs follow: export every page."] if more else []), *names.unused(exported)]
    _conclude(steps, plan, notes, applied=apply, as_json=context.obj.as_json)


class ModelNames:
    """Base models here for those of OpenAI: by `--map`, else by `--model`, else of the same name (an alias)."""

    def __init__(self, client: OpenAI, mapped: dict[str, str], default: str | None) -> None:
        self._client = client
        self._mapped = mapped
        self._default = default
        self._known: dict[str, bool] = {}

    def ours(self, theirs: str) -> tuple[str, str | None]:
        """The name here, and why it cannot be used if it cannot."""
        if theirs.startswith("ft:") and theirs not in self._mapped:
            return theirs, (
                f"it goes on from '{theirs}', whose weights stay at OpenAI: --map '{theirs}=OURS' names a model "
                "here to train instead."
            )
        ours = self._mapped.get(theirs) or self._default or theirs
        if self._is_here(ours):
            return ours, None
        remedy = (
            f"--map '{theirs}=OURS', or give a base model this alias: tunepool models add SOURCE --alias '{theirs}'"
        )
        return ours, f"no model '{ours}' is here: {remedy}."

    def _is_here(self, name: str) -> bool:
        if name not in self._known:
            try:
                requests.check_model(self._client, name)
                self._known[name] = True
            except official.NotFoundError:
                self._known[name] = False
        return self._known[name]

    def unused(self, exported: list[ExportedJob]) -> list[str]:
        """A sentence for each `--map` of a model that no job has: probably a slip."""
        theirs = {job.model for job in exported}
        return [f"--map: no job of the list has the model '{name}'." for name in self._mapped if name not in theirs]


class ImportPlan:
    """Says of each job what is to be done, from what is there already. Reads only."""

    def __init__(self, client: OpenAI, folder: DataFolder, names: ModelNames, *, resubmit: bool, every: bool) -> None:
        self.uploaded: dict[str, str] = {}  # sha256 → id here
        self.to_upload: dict[str, int] = {}  # sha256 → bytes
        self._client = client
        self._folder = folder
        self._names = names
        self._outcome: Outcome = "submit" if resubmit else "write"
        self._every = every
        self._digests: dict[Path, str] = {}

    def step(self, job: ExportedJob) -> ImportStep:
        """Raises openai.APIError when the server cannot be asked."""
        model, obstacle = self._names.ours(job.model)
        step = ImportStep(job, self._outcome, model, list(job.notes))
        if job.status != "succeeded" and not self._every:
            step.outcome = "left out"
            step.notes = [f"it has not succeeded at OpenAI ('{job.status}'); --all takes it too."]
        elif (made := self._imported(job)) is not None:
            step.outcome, step.made = "imported already", made
        else:
            obstacles = [*job.obstacles, *([obstacle] if obstacle else []), *self._find_files(step)]
            if obstacles:
                step.outcome, step.notes = "impossible", [*obstacles, *step.notes]
            else:
                self._count(step)
        return step

    def _imported(self, job: ExportedJob) -> str | None:
        """The newest job here that an earlier run made of it. One that failed or was cancelled counts too."""
        page = self._client.fine_tuning.jobs.list(limit=1, metadata={IMPORTED_FROM: job.id})
        # Another service may not know the filter.
        return next((ours.id for ours in page.data if (ours.metadata or {}).get(IMPORTED_FROM) == job.id), None)

    def _find_files(self, step: ImportStep) -> Iterator[str]:
        """Fill in the step's files; yields a sentence for each that cannot be used."""
        job = step.job
        for param, file_id in (("training_file", job.training_file), ("validation_file", job.validation_file)):
            if file_id is None:
                continue
            try:
                step.files[param] = self._data_file(file_id)
            except Unusable as error:
                yield f"{param}: {error}"

    def _data_file(self, file_id: str) -> DataFile:
        path = self._folder.path(file_id)
        digest = self._digests.get(path) or self._digest(path)
        if digest not in self.uploaded:
            same = requests.with_content(self._client, digest)
            usable = [file.id for file in same if file.status != "error"]
            if same and not usable:
                raise Unusable(f"the server found it unusable as {same[0].id}: {same[0].status_details}")
            if usable:
                self.uploaded[digest] = usable[0]
        name = self._folder.filename(file_id) or path.name
        if not name.lower().endswith(".jsonl"):  # else the server would refuse it by its name
            name += ".jsonl"
        return DataFile(name, path, digest, self.uploaded.get(digest))

    def _digest(self, path: Path) -> str:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._digests[path] = digest
        return digest

    def _count(self, step: ImportStep) -> None:
        for file in step.files.values():
            if file.uploaded is None:
                self.to_upload[file.sha256] = file.path.stat().st_size


def _carry_out(client: OpenAI, step: ImportStep, uploaded: dict[str, str], out: Path) -> None:
    """Upload what is missing, then create the job or write its request. A refusal of this job is noted."""
    try:
        for file in step.files.values():
            if file.sha256 not in uploaded:
                with file.path.open("rb") as stream:  # a stream: no file is ever whole in memory
                    made = client.files.create(file=(file.name, stream), purpose="fine-tune")
                uploaded[file.sha256] = made.id
        body = step.request(uploaded)
        if step.outcome == "submit":
            step.made, step.outcome = _submit(client, body), "submitted"
        else:
            step.made, step.outcome = _write(body, out / f"{step.job.id}.json", step.notes), "written"
    except official.APIStatusError as error:
        if error.status_code not in _REFUSALS:
            raise
        step.outcome, step.notes = "refused", [requests.reason(error), *step.notes]


def _submit(client: OpenAI, body: dict[str, Any]) -> str:
    """Two runs at once send the same key with the same body, and get the same job."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:32]
    key = f"import-{body['metadata'][IMPORTED_FROM]}-{digest}"
    return client.fine_tuning.jobs.create(**body, extra_headers={"Idempotency-Key": key}).id


def _write(body: dict[str, Any], path: Path, notes: list[str]) -> str:
    """A request that lies there already is kept as it is: somebody may have changed it."""
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8", errors="replace") != text:
            notes.append(f"{path} differs and is kept as it is; remove it to have it written anew.")
    except OSError as error:
        raise requests.BadSetting(f"{path} cannot be written: {error.strerror}.") from None
    return str(path)


_WORDS: Final[dict[Outcome, str]] = {
    "write": "request would be written",
    "submit": "would be submitted",
    "written": "request written to",
    "submitted": "submitted as",
    "imported already": "imported already as",
    "left out": "left out",
    "impossible": "cannot be recreated",
    "refused": "refused by the server",
}


def _show(step: ImportStep, uploaded: dict[str, str], *, as_json: bool) -> None:
    """One job: a line, and a line for each note; with --json one document."""
    job = step.job
    places = {file.sha256: uploaded.get(file.sha256) or str(file.path) for file in step.files.values()}
    if as_json:
        known = {"imported_from": job.id, "outcome": step.outcome, "made": step.made, "notes": step.notes}
        body = step.request(places) if step.files and step.outcome != "impossible" else None
        print(json_line({**known, "request": body}))
        return
    outcome = f"{_WORDS[step.outcome]} {step.made or ''}".rstrip()
    print(_line(f"{job.id}  {job.model} -> {step.model}  {job.method}  {outcome}"))
    for note in step.notes:
        print(_line(f"    {note}"))


def _line(text: str) -> str:
    return printable(text).replace("\n", "\ufffd")  # what others wrote makes no lines of its own


def _conclude(steps: list[ImportStep], plan: ImportPlan, notes: list[str], *, applied: bool, as_json: bool) -> None:
    outcomes = Counter(step.outcome for step in steps)
    sizes = [size for digest, size in plan.to_upload.items() if not applied or digest in plan.uploaded]
    if as_json:
        counts = {"jobs": len(steps), "outcomes": outcomes, "files_uploaded": len(sizes), "bytes": sum(sizes)}
        print(json_line({"applied": applied, **counts, "notes": [*notes, _STAYS]}))
    else:
        counted = [f"{count} {_counted(outcome)}" for outcome, count in outcomes.items()]
        uploads = f"{len(sizes)} files {'uploaded' if applied else 'to upload'}, {sum(sizes):,} bytes"
        print(f"{len(steps)} jobs{': ' if counted else ''}{', '.join(counted)}. {uploads}.")
        for note in [*notes, _STAYS, *([] if applied else ["Nothing was changed. --apply does it."])]:
            print(_line(note))
    if outcomes["refused"]:
        raise typer.Exit(_EXIT_REFUSED)
    if outcomes["impossible"]:
        raise typer.Exit(_EXIT_INCOMPLETE)


def _counted(outcome: Outcome) -> str:
    return _WORDS[outcome].removesuffix(" as").removesuffix(" to")
