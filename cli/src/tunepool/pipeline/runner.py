"""Carries out a pipeline: preflight, submit, evaluate, gate, promote. Started again, it finds what is there already.

Nothing is kept on the runner's disk. A job carries the hash of its content as metadata, an evaluation that of its
question; whoever has the same content finds them, on whatever machine.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tunepool import official, preflights, releasing, requests, watching
from tunepool.pipeline import curves
from tunepool.pipeline.ci_environment import CiEnvironment
from tunepool.pipeline.document import Items, Judging, Pipeline
from tunepool.pipeline.outcome import (
    BAD_INPUT,
    ENDED_EARLY,
    GATE_FAILED,
    JOB_FAILED,
    UNAPPROVED,
    UNDECIDED,
    DataFault,
    RunOutcome,
    Step,
)
from tunepool.pipeline.service import Service, error_code

CONTENT: Final = "tunepool_content"  # metadata of jobs and evaluations
POLL_SECONDS: Final = 0.5
LISTED: Final = 100
OVER: Final = frozenset({"succeeded", "failed", "cancelled"})
FORMAT: Final = 1  # of the content that is hashed


class RunEnded(Exception):
    """The run ends here, with an exit code and a sentence."""

    def __init__(self, exit_code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.message = message


@dataclass
class Runner:
    """One run. `outcome` grows as it goes, so that whatever ends it leaves what was found out."""

    service: Service
    pipeline: Pipeline
    folder: Path
    where: CiEnvironment
    gate_text: str | None
    outcome: RunOutcome
    tell: Callable[[str], None]
    show: Callable[[watching.Update], None] = lambda _: None
    cancel_on_interrupt: bool = False
    deadline: float | None = None  # on `clock`
    preflight_seconds: float = 900.0
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _ids: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        """Raises RunEnded, and what the client raises."""
        model = self._trained()
        if self.pipeline.evaluate is None:
            self.outcome.message = f"{model} is trained."
            return
        alias = self._alias()
        if alias is not None and alias["model"] == model:
            self._note("promote", "skipped", f"{alias['id']} names it already, at version {alias['version']}.")
            self.outcome.gate = alias["history"][0]["gate"]
            self.outcome.message = f"Nothing changed: {alias['id']} names {model}."
            return
        evaluation = self._evaluated(model, alias, self.pipeline.evaluate)
        if self.gate_text is None:
            self.outcome.message = f"{model} is evaluated: {evaluation['id']}."
            return
        self._judge(model, evaluation)
        if self.pipeline.promote is not None:
            self._promote(model, evaluation)

    # --- the adapter -------------------------------------------------------------------------------------------------

    def _trained(self) -> str:
        """The adapter of this content: an earlier one's, or that of a job of now."""
        self.outcome.content = content = self._content()
        jobs = self._jobs_of(content)
        done = next((job for job in jobs if job["status"] == "succeeded" and self._is_there(job)), None)
        if done is not None:
            self._keep(done)
            model = str(done["fine_tuned_model"])
            self._note("train", "skipped", f"Nothing changed: {model} of {done['id']} is the answer.")
            return model
        going = next((job for job in jobs if job["status"] not in OVER), None)
        if going is None:
            if self.pipeline.preflight:
                self._preflight()
            going = self._submit(content, ended=len(jobs))
        else:
            self._note("submit", "skipped", f"{going['id']} has this content and is {going['status']}; it is followed.")
        return self._followed(going)

    def _content(self) -> str:
        """Of data, base, settings and the server's version. The same content trains the same adapter.

        The base comes first: a wrong name costs no upload.
        """
        asked = self.pipeline
        base = self._get(f"models/{quote(asked.model, safe=':')}")
        facts = {
            "format": FORMAT,
            "server": self._server_version(),
            "base": [base["id"], base["commit"], base["locator"]],
            "training": self._sha256(asked.training),
            "validation": self._sha256(asked.validation),
            "job": [asked.suffix, asked.seed, asked.method, asked.hyperparameters, asked.tunepool],
        }
        return digest(facts)

    def _server_version(self) -> str:
        alive = self.service.get("../livez")
        if "version" not in alive:
            raise RunEnded(BAD_INPUT, "The server tells no version: it is older than this command. Upgrade it.")
        return str(alive["version"])

    def _sha256(self, source: str | None) -> str | None:
        if source is None:
            return None
        path = self.folder / source
        if path.is_file():
            return requests.sha256_of(path)
        file_id = source if source.startswith("file-") else self._file_id(source)
        stored = self.service.get(f"files/{quote(file_id)}")
        return str((stored.get("tunepool") or {}).get("sha256"))

    def _file_id(self, source: str) -> str:
        """Uploads a path once; the bytes that the project has already are not sent again."""
        if source not in self._ids:
            path = self.folder / source
            self._ids[source] = requests.file_id(self.service.client, str(path) if path.is_file() else source)
        return self._ids[source]

    def _jobs_of(self, content: str) -> list[dict[str, Any]]:
        """The project's jobs of this content, newest first."""
        return list(self.service.get(f"fine_tuning/jobs?metadata[{CONTENT}]={content}&limit={LISTED}")["data"])

    def _is_there(self, job: dict[str, Any]) -> bool:
        """Whether nobody has deleted what the job made."""
        try:
            self.service.get(f"models/{quote(job['fine_tuned_model'], safe=':')}")
        except official.NotFoundError:
            return False
        return True

    def _body(self) -> dict[str, Any]:
        asked = self.pipeline
        method = {"type": asked.method, asked.method: {"hyperparameters": asked.hyperparameters}}
        return requests.given(
            model=asked.model,
            training_file=self._file_id(asked.training),
            validation_file=None if asked.validation is None else self._file_id(asked.validation),
            suffix=asked.suffix,
            seed=asked.seed,
            method=method,
        )

    def _preflight(self) -> None:
        with self._timed("preflight") as step:
            body = requests.given(**self._body(), tunepool=self.pipeline.tunepool or None)
            answer = preflights.answer(self.service.client, body, patience_seconds=self._left(self.preflight_seconds))
            report = answer["report"]
            if report is None:
                raise RunEnded(BAD_INPUT, f"The preflight found no answer: {answer['error']['message']}")
            self._collect_faults(report)
            if not report["ok"]:
                refusal = report["refusal"] or {"message": "its rows are not trained as they are"}
                raise RunEnded(BAD_INPUT, f"The job would not train: {refusal['message']}")
            step.words = "The job would train."

    def _collect_faults(self, report: dict[str, Any]) -> None:
        """What is wrong with the data, at the lines of the files that the runner has."""
        paths = {"training": self.pipeline.training, "validation": self.pipeline.validation}
        for name, path in paths.items():
            if path is None:
                continue
            for problem in report["files"].get(name, {}).get("problems", []):
                code = str(problem.get("code") or "invalid")
                fault = DataFault(path, problem["line"], problem.get("column"), problem["message"], code)
                self.outcome.data_faults.append(fault)
            for fault in ((report["tokens"] or {}).get(name) or {}).get("faults", []):
                self.outcome.data_faults.append(DataFault(path, fault["row"], None, fault["message"], "row"))

    def _submit(self, content: str, *, ended: int) -> dict[str, Any]:
        """A runner that dies after this and starts again finds the job by its content, or by the idempotency key."""
        queue = {"group": self.where.group(self.pipeline.name), "supersede": "running"}
        labels = {CONTENT: content, "pipeline": self.pipeline.name, "git_sha": self.where.git_sha}
        labels |= {"ci_run": self.where.run_url[:512]} if self.where.run_url else {}
        extension = {**self.pipeline.tunepool, "queue": {**self.pipeline.tunepool.get("queue", {}), **queue}}
        with self._timed("submit") as step:
            try:
                job = self.service.client.fine_tuning.jobs.create(
                    **self._body(),
                    metadata={name: value for name, value in labels.items() if value},
                    extra_body={"tunepool": extension},
                    extra_headers={"Idempotency-Key": f"run-{content[:48]}-{ended}"},
                ).to_dict()
            except official.APIStatusError as error:
                # Another runner came first with this content, from another commit or another run.
                if error_code(error) != "idempotency_key_reused":
                    raise
                job = self._jobs_of(content)[0]
            step.words = f"{job['id']} is {job['status']}."
        return job

    def _followed(self, begun: dict[str, Any]) -> str:
        self._keep(begun)
        job_id, client = begun["id"], self.service.client
        with self._timed("train") as step, watching.interruptible(client, job_id, cancel=self.cancel_on_interrupt):
            timeout = None if self.deadline is None else self._left(0.0)
            for update in watching.follow(
                client, job_id, timeout_seconds=timeout, tell=self.tell, sleep=self.sleep, clock=self.clock
            ):
                self.show(update)
            job = update.job
            self._keep(job.to_dict())
            step.words = f"{job.id} has {job.status}."
            if job.status == "failed":
                raise RunEnded(JOB_FAILED, f"{job.id} failed: {job.error.message if job.error else 'no reason given'}")
            if job.status == "cancelled":
                newer = watching.ours(job).get("superseded_by")
                raise RunEnded(ENDED_EARLY, f"{job.id} was {f'superseded by {newer}' if newer else 'cancelled'}.")
        self.outcome.curves = curves.of_job(client, job.to_dict())
        assert job.fine_tuned_model is not None
        return job.fine_tuned_model

    def _keep(self, job: dict[str, Any]) -> None:
        self.outcome.job, self.outcome.model = job["id"], job["fine_tuned_model"]
        self.outcome.page = self.service.page_of(job["id"])
        usage = (job.get("tunepool") or {}).get("usage") or {}
        self.outcome.device_seconds = usage.get("device_seconds")

    # --- its figures -------------------------------------------------------------------------------------------------

    def _alias(self) -> dict[str, Any] | None:
        """The alias as it stands, with its history; None while it names nothing."""
        name = self.pipeline.promote
        if name is None:
            return None
        try:
            return self._get(f"aliases/{quote(name)}")
        except official.NotFoundError:
            return None

    def _evaluated(self, model: str, alias: dict[str, Any] | None, asked: Judging) -> dict[str, Any]:
        """The evaluation of this model beside the others; one that was asked before, by whomever, is taken up."""
        base = self._get(f"models/{quote(self.pipeline.model, safe=':')}")["id"]
        others = [base if name == "base" else name for name in asked.beside]
        subjects = list(dict.fromkeys([model, *([] if alias is None else [alias["id"]]), *others]))
        question = requests.given(
            subjects=subjects,
            items=self._items(asked.items),
            measures=asked.measures,
            generation=asked.generation,
            slices=asked.slices or None,
            forgetting=asked.forgetting or None,
            against=subjects[1] if len(subjects) > 1 else None,
        )
        version = 0 if alias is None else alias["version"]
        key = digest([question, self.pipeline.promote, version])
        with self._timed("evaluate") as step:
            record = self._evaluation_of(key)
            if record is None:
                labels = {CONTENT: key, "alias_version": str(version), "pipeline": self.pipeline.name}
                record = self._post("evaluations", {**question, "name": self.pipeline.name, "metadata": labels})
            record = self._awaited(record)
            step.words = f"{record['id']}: {record['answered']} answers."
        self.outcome.subjects = record["report"]["subjects"]
        return record

    def _items(self, asked: Items) -> dict[str, Any]:
        most = requests.given(max_items=asked.max_items)
        if asked.file is not None:
            return {"type": "file", "file_id": self._file_id(asked.file), **most}
        if asked.split is not None:
            return {"type": "split", "job": self.outcome.job, "share": asked.split, **most}
        return {"type": "suite", "suite": asked.suite}

    def _evaluation_of(self, key: str) -> dict[str, Any] | None:
        """The newest evaluation of this question that has not failed, among the project's last hundred."""
        for record in self._get(f"evaluations?limit={LISTED}")["data"]:
            if record["request"]["metadata"].get(CONTENT) == key and record["status"] not in {"failed", "cancelled"}:
                return dict(record)
        return None

    def _awaited(self, record: dict[str, Any]) -> dict[str, Any]:
        place = f"evaluations/{record['id']}"
        self.outcome.evaluation = record["id"]
        self.tell(f"Evaluation {record['id']} is {record['status']}")
        with watching.interruptible_work(
            cancel=(lambda: self._post(f"{place}/cancel")) if self.cancel_on_interrupt else None,
            cancelled=f"Evaluation {record['id']} is cancelled.",
            left=f"Evaluation {record['id']} goes on.",
        ):
            while record["status"] not in OVER:
                if self.deadline is not None and self.clock() >= self.deadline:
                    raise watching.NotInTime(f"Evaluation {record['id']} is {record['status']}; it goes on.")
                self.sleep(POLL_SECONDS)
                again = partial(self._get, place)
                record = watching.in_the_end(again, tell=self.tell, sleep=self.sleep, clock=self.clock)
        if record["status"] == "failed":
            raise RunEnded(JOB_FAILED, f"Evaluation {record['id']} failed: {record['error']['message']}")
        if record["status"] == "cancelled":
            raise RunEnded(ENDED_EARLY, f"Evaluation {record['id']} was cancelled.")
        return record

    # --- the verdict -------------------------------------------------------------------------------------------------

    def _promotion(self, model: str, evaluation: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """(alias, body). Without an alias the gate is only judged, so that its name does not matter."""
        gate = {"text": self.gate_text, "evaluation": evaluation["id"]}
        return self.pipeline.promote or "candidate@gate", {"model": model, "gate": gate}

    def _judge(self, model: str, evaluation: dict[str, Any]) -> None:
        """By the server, which knows size and cost besides."""
        alias, body = self._promotion(model, evaluation)
        with self._timed("gate") as step:
            self.outcome.gate = gate = self._post(f"aliases/{quote(alias)}/promote", {**body, "dry_run": True})["gate"]
            step.words = f"The gate has {'not been decided' if gate['status'] == 'undecided' else gate['status']}."
            if gate["status"] != "passed":
                first = next(stated for stated in gate["assertions"] if stated["status"] == gate["status"])
                code = GATE_FAILED if gate["status"] == "failed" else UNDECIDED
                raise RunEnded(code, f"{step.words} {first['title'] or first['assert']}: {first['reason']}")
        self.outcome.message = f"{model} passes the gate."

    def _promote(self, model: str, evaluation: dict[str, Any]) -> None:
        alias, body = self._promotion(model, evaluation)
        # What the alias named when the figures were asked for: they are compared with that.
        body["expected_version"] = int(evaluation["request"]["metadata"]["alias_version"])
        body["reason"] = " ".join(part for part in (self.pipeline.name, self.where.git_sha, self.where.run_url) if part)
        with self._timed("promote") as step:
            try:
                answer = self._post(f"aliases/{quote(alias)}/promote", body)
            except official.APIStatusError as error:
                if error_code(error) != "alias_moved":
                    raise
                raise RunEnded(ENDED_EARLY, f"{alias} was moved by another: {error.message}") from None
            if waiting := answer.get("promotion"):
                raise RunEnded(UNAPPROVED, releasing.waiting_words(waiting))
            self.outcome.message = step.words = f"{alias} names {model} (version {answer['version']['number']})."
        self.outcome.alias = alias

    # --- how it is said ----------------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, name: str) -> Iterator[Step]:
        """A step of the outcome: passed, unless what is in the block raises."""
        step, began = Step(name, "failed", ""), self.clock()
        self.outcome.steps.append(step)
        try:
            yield step
            step.status = "passed"
        except Exception as error:
            step.words = str(error)
            raise
        finally:
            step.seconds = self.clock() - began
            self.tell(f"{name}: {step.words or step.status}")

    def _note(self, name: str, status: str, words: str) -> None:
        self.outcome.steps.append(Step(name, status, words))
        self.tell(f"{name}: {words}")

    def _left(self, otherwise: float) -> float:
        return otherwise if self.deadline is None else max(self.deadline - self.clock(), 0.0)

    def _get(self, path: str) -> dict[str, Any]:
        return self.service.get(f"tunepool/{path}")

    def _post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.service.post(f"tunepool/{path}", body)


def digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
