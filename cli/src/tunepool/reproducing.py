"""`tunepool reproduce`: the job that a signed statement describes, asked for once more, and whether it made the same.

What a request left open is written as it was settled then: what the service would choose may have changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import quote, urljoin

import typer
from rich.console import Console

from tunepool import adapters, likeness, native, official, proving, requests, watching
from tunepool.likeness import RelativeDifference
from tunepool.printing import json_line, printable
from tunepool.requests import BadSetting

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.fine_tuning import FineTuningJob

BUILD_TYPE: Final = "urn:tunepool:fine-tuning:1"
REPRODUCES: Final = "reproduces"  # metadata: the job that this one is to be like
GPU_TOLERANCE: Final = 0.05
EXIT_DIFFERS: Final = 1
# Settled from what the request says and from the rows; written down, so that nothing else has a say.
_ADAPTER: Final = ("r", "lora_alpha", "target_modules")
_TRAINING: Final = ("dtype", "batch_size", "max_length", "learning_rate", "optim", "num_train_epochs")
_LAYERS: Final = "gradient_checkpointing_layers"
_TIME: Final = "template_time"
_VERDICTS: Final = {
    "same": "SAME: curves and weights are equal, bit by bit.",
    "within_tolerance": "SAME within the tolerance of {tolerance:g}.",
    "differs": "DIFFERS: {first}.",
}
messages = Console(stderr=True)


@dataclass(frozen=True)
class JobOutput:
    """What a job made: its record of files, and the signed statement on it (None: unsigned)."""

    name: str
    sums: dict[str, str]
    statement: dict[str, Any]

    @property
    def build(self) -> dict[str, Any]:
        return dict(self.statement["predicate"]["buildDefinition"])

    @property
    def settled(self) -> dict[str, Any]:
        return dict(self.build["internalParameters"])

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.settled["spec"])

    @property
    def versions(self) -> dict[str, str]:
        return dict(self.statement["predicate"]["runDetails"]["builder"]["version"])

    @property
    def sources(self) -> dict[str, dict[str, str]]:
        """Digest by name of what went in: data, base, parent."""
        return {source["name"]: source.get("digest", {}) for source in self.build["resolvedDependencies"]}

    @property
    def devices(self) -> str:
        return f"{self.settled['device_kind']} ({', '.join(self.settled['devices'])})"


@dataclass
class Reproduction:
    """A verdict in the making."""

    job: str
    tolerance: float
    again: str = ""
    beforehand: list[str] = field(default_factory=list)
    otherwise: list[str] = field(default_factory=list)
    curve: RelativeDifference | None = None
    weights: RelativeDifference | None = None
    differing: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        parts = [part for part in (self.curve, self.weights) if part is not None]
        if not self.differing and all(part.first is None for part in parts):
            return "same"
        unlike = [name for name in self.differing if not name.endswith(".safetensors")]
        return "differs" if unlike or not all(part.within for part in parts) else "within_tolerance"

    @property
    def first(self) -> str:
        """The curve is read first: training comes before its product."""
        known = [part.first for part in (self.curve, self.weights) if part is not None and part.first]
        return "; ".join(known) or f"{', '.join(self.differing)}: other bytes"

    def document(self) -> dict[str, Any]:
        return {
            "object": "tunepool.reproduction",
            "job": self.job,
            "reproduction": self.again,
            "verdict": self.verdict,
            "tolerance": self.tolerance,
            "beforehand": self.beforehand,
            "otherwise": self.otherwise,
            "curve": None if self.curve is None else self.curve.document(),
            "weights": None if self.weights is None else self.weights.document(),
            "differing_files": self.differing,
        }


def reproduce(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    job_id: Annotated[str, typer.Argument(metavar="JOB")],
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The training file, where the project has it not.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The validation file, likewise.")
    ] = None,
    key: Annotated[str | None, typer.Option(metavar="FILE|URL", help="The public key, as for verify.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1, help="Relative; 0 on CPUs and 0.05 with a GPU if left out.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(min=1, help="Seconds to wait; then exit 5. The job goes on.")] = None,
    on_interrupt: Annotated[
        Literal["leave", "cancel"], typer.Option(help="What becomes of the job on SIGINT or SIGTERM.")
    ] = "leave",
) -> None:
    """Train a job again from its signed statement, and compare curves and weights. Started again, it goes on.

    Exit 0 same, or within the tolerance; 1 it differs, or the job failed; 2 it cannot be asked for again.
    """
    client: OpenAI = context.obj.client
    try:
        known = proving.keys_of(key) if key is not None else proving.keys_of_the_server(context)
        job = client.fine_tuning.jobs.retrieve(job_id)
        then = _made(client, job, known)
        _must_be_there(client, then)
        result = Reproduction(job_id, _tolerance(then, tolerance), beforehand=list(_now_otherwise(context, then)))
        for words in result.beforehand:
            messages.print(printable(words), markup=False, highlight=False, soft_wrap=True)
        again = _unfinished(client, job_id) or _submitted(client, job_id, then, file=file, validation=validation)
        again = _followed(client, again, timeout=timeout, cancel=on_interrupt == "cancel")
        result.again = again.id
        if again.status == "succeeded":
            now = _made(client, again, known)
            result.tolerance = max(result.tolerance, _tolerance(now, tolerance))
            _compare(client, result, (job, then), (again, now))
    except proving.NotProven as error:
        raise BadSetting(f"{job_id}: {error}") from None
    _tell(context, result, again)


def _tolerance(made: JobOutput, asked: float | None) -> float:
    if asked is not None:
        return asked
    return 0.0 if made.settled["device_kind"] == "cpu" else GPU_TOLERANCE


# --- what was ------------------------------------------------------------------------------------------------------


def _made(client: OpenAI, job: FineTuningJob, known: dict[str, Any]) -> JobOutput:
    """The product of a job with its statement, whose signature holds. Raises BadSetting, NotProven."""
    if job.fine_tuned_model is None:
        raise BadSetting(f"{job.id} is {job.status} and has made nothing that could be made again.")
    record = adapters.describe(client, job.fine_tuned_model)
    sums = {file["name"]: file["sha256"] for file in record["files"]}
    with tempfile.TemporaryDirectory() as folder:
        adapters.fetch(record["files"], out=Path(folder), only={proving.FILE_NAME})
        stated = proving.stated_in(Path(folder) / proving.FILE_NAME, known)
    if stated["predicate"]["buildDefinition"]["buildType"] != BUILD_TYPE:
        raise BadSetting(f"The statement on {job.id} is of another kind than this command reads: upgrade it.")
    for entry in stated["subject"]:
        if sums.get(entry["name"]) != entry["digest"]["sha256"]:
            raise proving.NotProven("altered_file", f"{entry['name']} is not the file that was signed.")
    return JobOutput(job.fine_tuned_model, sums, stated)


def _must_be_there(client: OpenAI, then: JobOutput) -> None:
    """The base at its commit, and the parent as it was. Raises BadSetting."""
    base = then.spec["base_model"]
    now = client.get(f"/tunepool/models/{quote(base['name'], safe=':')}", cast_to=object)
    assert isinstance(now, dict)
    # A folder has no commit; its tokenizer files are compared at the end.
    if base["source"] != "path" and now["commit"] != base["revision"]:
        raise BadSetting(f"The base {base['name']} was at {base['revision']} and is at {now['commit']} now.")
    parent = then.spec.get("parent")
    if parent is not None:
        files = {file["name"]: file["sha256"] for file in adapters.describe(client, parent["name"])["files"]}
        if any(files.get(file["name"]) != file["sha256"] for file in parent["files"]):
            raise BadSetting(f"The model {parent['name']}, which training went on from, has other files now.")


def _now_otherwise(context: typer.Context, then: JobOutput) -> Iterator[str]:
    """What of server, libraries and devices is not as it was; results may differ by it."""
    client: OpenAI = context.obj.client
    alive = client.get(urljoin(str(client.base_url), "../livez"), cast_to=object)
    server = alive.get("version") if isinstance(alive, dict) else None
    pool = native.get(context, "pool")
    workers = [worker["libraries"] or {} for worker in pool["workers"]]
    for name, was in then.versions.items():
        now = {server} if name == "tunepool-server" else {libraries.get(name) for libraries in workers}
        if now != {was}:
            yield f"{name} was {was} then; now: {_listed(version or 'not known' for version in now)}"
    devices = {f"{device['kind']} ({device['name']})" for device in pool["devices"]}
    if devices != {f"{then.settled['device_kind']} ({name})" for name in then.settled["devices"]}:
        yield f"It ran on {then.devices}; the pool has now: {_listed(devices)}"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(sorted(words)) or "none"


# --- once more ------------------------------------------------------------------------------------------------------


def request_of(then: dict[str, Any], settled: dict[str, Any]) -> dict[str, Any]:
    """The body of a job that can be settled in one way only: as `settled`, which is what the statement says.

    Args:
        then: the request as it came.
        settled: `internalParameters` of the statement: spec, micro_batch_size, gradient_checkpointing with its layers.
    """
    spec = settled["spec"]
    ours = {name: part for name, part in (then.get("tunepool") or {}).items() if name not in {"queue", "integrations"}}
    training = {name: spec["training"][name] for name in _TRAINING}
    if spec["training"]["max_steps"] is not None:
        del training["num_train_epochs"]  # the one of the two that was asked for
    if not spec["training"]["packing"]:
        training["packing"] = False  # asked for, it could not be given up where the trainer must
    training["per_device_train_batch_size"] = settled["micro_batch_size"]
    training["gradient_checkpointing"] = settled["gradient_checkpointing"]
    if settled.get(_LAYERS) is not None:  # a version before this one noted none
        training[_LAYERS] = settled[_LAYERS]
    if spec["training"].get(_TIME) is not None:  # nor a time
        training[_TIME] = spec["training"][_TIME]
    ours["training"] = {**_chosen(ours.get("training")), **training}
    adapter = _chosen(ours.get("adapter")) | {"method": spec["adapter"]["method"]}
    if spec.get("parent") is None and spec["adapter"]["method"] != "full":
        adapter |= {name: spec["adapter"][name] for name in _ADAPTER}
    ours["adapter"] = adapter
    ours["placement"] = {**_chosen(ours.get("placement")), **{n: spec["placement"][n] for n in ("strategy", "gpus")}}
    model = (spec.get("parent") or spec["base_model"])["name"]
    kept = {
        name: _without_multiplier(value)
        for name, value in then.items()
        if name in {"suffix", "method", "hyperparameters"}
    }
    return requests.given(**kept, model=model, seed=spec["seed"], tunepool=ours)


def _chosen(part: dict[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (part or {}).items() if value != "auto"}


def _without_multiplier(value: Any) -> Any:
    """It scales the learning rate that is chosen, and the rate stands there now."""
    if not isinstance(value, dict):
        return value
    return {name: _without_multiplier(inner) for name, inner in value.items() if name != "learning_rate_multiplier"}


def _unfinished(client: OpenAI, job_id: str) -> FineTuningJob | None:
    """A reproduction of this job that somebody has begun, and that is not over."""
    page = client.fine_tuning.jobs.list(metadata={REPRODUCES: job_id}, limit=20)
    return next((job for job in page.data if job.status not in watching.TERMINAL), None)


def _submitted(
    client: OpenAI, job_id: str, then: JobOutput, *, file: Path | None, validation: Path | None
) -> FineTuningJob:
    body = request_of(then.build["externalParameters"]["request"], then.settled)
    files = {"training_file": ("--file", file), "validation_file": ("--validation", validation)}
    for name, (option, path) in files.items():
        if name in then.sources:
            body[name] = _data(client, then.sources[name]["sha256"], path, name=name, option=option)
    return client.post(
        "/fine_tuning/jobs", cast_to=official.FineTuningJob, body={**body, "metadata": {REPRODUCES: job_id}}
    )


def _data(client: OpenAI, digest: str, path: Path | None, *, name: str, option: str) -> str:
    """The id of a file of these bytes; the one at `path` is uploaded where the project has none. Raises BadSetting."""
    if path is not None and (given := requests.sha256_of(path)) != digest:
        raise BadSetting(f"{option}: {path} has the sha256 {given}, and the {name} of then {digest}.")
    there = next((file.id for file in requests.with_content(client, digest) if file.status != "error"), None)
    if there is not None:
        return there
    if path is None:
        raise BadSetting(f"The project has no file with the sha256 {digest} ({name}). Give it with {option}.")
    return requests.upload(client, path).id


def _followed(client: OpenAI, job: FineTuningJob, *, timeout: float | None, cancel: bool) -> FineTuningJob:
    with watching.interruptible(client, job.id, cancel=cancel), watching.display(messages) as shown:
        for update in watching.follow(client, job.id, timeout_seconds=timeout, tell=shown.tell):
            shown.show(update)
    return update.job


# --- whether it is the same ----------------------------------------------------------------------------------------


def _compare(
    client: OpenAI,
    result: Reproduction,
    earlier: tuple[FineTuningJob, JobOutput],
    later: tuple[FineTuningJob, JobOutput],
) -> None:
    (first, then), (second, now) = earlier, later
    result.otherwise = list(differences(then, now))
    before, after = (client.files.content(job.result_files[0]).text for job in (first, second))
    result.curve = likeness.of_curves(before, after, tolerance=result.tolerance)
    _, result.differing = likeness.of_files(then.sums, now.sums)
    weights = {name for name in result.differing if name.endswith(".safetensors")}
    result.weights = _weights(client, then, now, weights, tolerance=result.tolerance)


def _weights(
    client: OpenAI, then: JobOutput, now: JobOutput, names: set[str], *, tolerance: float
) -> RelativeDifference:
    """Files that differ are downloaded, and the first one that is farther off than allowed is named."""
    if not names:
        return RelativeDifference(within=True, off=0.0, first=None)
    if missing := sorted(names - (then.sums.keys() & now.sums.keys())):
        return RelativeDifference(within=False, off=float("inf"), first=f"{missing[0]} is in one of them only")
    with tempfile.TemporaryDirectory() as folder:
        for place, made in (("then", then), ("now", now)):
            adapters.fetch(adapters.describe(client, made.name)["files"], out=Path(folder) / place, only=names)
        each = [
            likeness.of_weights(Path(folder) / "then" / name, Path(folder) / "now" / name, tolerance=tolerance)
            for name in sorted(names)
        ]
    return max(each, key=lambda part: part.off)


def differences(then: JobOutput, now: JobOutput) -> Iterator[str]:
    """What of the two statements is not the same, and could be why the results are not."""
    yield from _unlike("setting", dict(_leaves("", _comparable(then))), dict(_leaves("", _comparable(now))))
    yield from _unlike("", then.versions, now.versions)
    yield from _unlike("", {"devices": then.devices}, {"devices": now.devices})
    before, after = ({n: str(d) for n, d in made.sources.items() if n != "source"} for made in (then, now))
    yield from _unlike("", before, after)


def _comparable(made: JobOutput) -> dict[str, Any]:
    """What the run was settled to, as it was at its end; how it waited is no part of it."""
    spec = {name: part for name, part in made.spec.items() if name not in {"queue", "base_model", "data", "parent"}}
    at_last = {
        "per_device_train_batch_size": made.settled["micro_batch_size"],
        "gradient_checkpointing": made.settled["gradient_checkpointing"],
        _LAYERS: made.settled.get(_LAYERS),
    }
    return {**spec, "training": {**spec["training"], **at_last}}


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{path}.{name}".lstrip("."), inner)


def _unlike(kind: str, then: dict[str, Any], now: dict[str, Any]) -> Iterable[str]:
    for name in dict.fromkeys([*then, *now]):
        if then.get(name) != now.get(name):
            yield f"{kind} {name}: {then.get(name)} then, {now.get(name)} now".lstrip()


def _tell(context: typer.Context, result: Reproduction, again: FineTuningJob) -> None:
    if again.status != "succeeded":
        newer = watching.ours(again).get("superseded_by")
        why = again.error.message if again.error else f"superseded by {newer}" if newer else "no reason given"
        document = {**result.document(), "verdict": again.status, "message": why}
        print(json_line(document) if context.obj.as_json else printable(f"{again.id} was {again.status}: {why}"))
        raise typer.Exit(EXIT_DIFFERS)
    if context.obj.as_json:
        print(json_line(result.document()))
    else:
        for words in result.otherwise:
            print(printable(f"otherwise: {words}"))
        print(printable(_VERDICTS[result.verdict].format(tolerance=result.tolerance, first=result.first)))
    if result.verdict == "differs":
        raise typer.Exit(EXIT_DIFFERS)
