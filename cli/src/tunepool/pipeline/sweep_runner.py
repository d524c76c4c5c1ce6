"""Carries out `sweep.yaml`: the sweep on the server, and with its best trial what a pipeline does with its adapter.

Like a pipeline it keeps nothing on the runner's disk: the sweep carries the hash of its content, so that whoever starts
the same file again finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tunepool import official, requests, watching
from tunepool.pipeline.outcome import ENDED_EARLY, JOB_FAILED, RunOutcome
from tunepool.pipeline.runner import CONTENT, LISTED, OVER, RunEnded, Runner, digest
from tunepool.pipeline.service import error_code
from tunepool.pipeline.sweep_document import SweepFile

POLL_SECONDS: Final = 1.0


@dataclass
class SweepOutcome(RunOutcome):
    """`sweep`: as the server last showed it."""

    sweep: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        return {**super().document(), "object": "tunepool.sweep_run"}


@dataclass
class SweepRunner(Runner):
    """A run whose training is a sweep."""

    seen: Callable[[dict[str, Any]], None] = lambda _: None
    _told: dict[int, str] = field(default_factory=dict)
    _detail: str | None = None

    def _trained(self) -> str:
        with self._timed("sweep") as step:
            sweep = self._awaited_sweep(self.asked())
            best = self._best_of(sweep)
            step.words = (
                f"{sweep['id']}: trial {best['number']} of {len(sweep['trials'])} is the best, {best['model']}."
            )
        self._keep(self.service.client.fine_tuning.jobs.retrieve(best["job"]).to_dict())
        self.outcome.device_seconds = sweep["device_seconds"]
        return str(best["model"])

    def asked(self) -> dict[str, Any]:
        """The sweep of this content: an earlier one, or that of now."""
        self.outcome.content = content = self._content()
        known = self._sweeps_of(content)
        usable = next((sweep for sweep in known if sweep["status"] not in {"failed", "cancelled"}), None)
        if usable is not None:
            self.tell(f"{usable['id']} has this content and is {usable['status']}; it is the one.")
            return self._get(f"sweeps/{usable['id']}")
        return self._submitted(content, ended=len(known))

    def _content(self) -> str:
        """Of all that a pipeline's training is made of, and of what is tried."""
        return digest([super()._content(), self._document.sweep.model_dump(mode="json")])

    @property
    def _document(self) -> SweepFile:
        assert isinstance(self.pipeline, SweepFile)
        return self.pipeline

    def _sweeps_of(self, content: str) -> list[dict[str, Any]]:
        """Among the project's last hundred, newest first."""
        listed = self._get(f"sweeps?limit={LISTED}")["data"]
        return [sweep for sweep in listed if sweep["metadata"].get(CONTENT) == content]

    def _submitted(self, content: str, *, ended: int) -> dict[str, Any]:
        """A runner that dies after this finds the sweep by its content, or by the idempotency key."""
        labels = {CONTENT: content, "pipeline": self.pipeline.name, "git_sha": self.where.git_sha}
        labels |= {"ci_run": self.where.run_url[:512]} if self.where.run_url else {}
        job = {**self._body(), **requests.given(tunepool=self.pipeline.tunepool or None)}
        body = {
            "name": self.pipeline.name,
            "job": job,
            **self._document.sweep.model_dump(mode="json", exclude_none=True),
            "metadata": {name: value for name, value in labels.items() if value},
        }
        key = {"Idempotency-Key": f"sweep-{content[:48]}-{ended}"}
        try:
            answer = self.service.client.post("/tunepool/sweeps", cast_to=object, body=body, options={"headers": key})
        except official.APIStatusError as error:
            # Another runner came first with this content, from another commit or another run.
            if error_code(error) != "idempotency_key_reused":
                raise
            return self._get(f"sweeps/{self._sweeps_of(content)[0]['id']}")
        assert isinstance(answer, dict)
        return answer

    def _awaited_sweep(self, sweep: dict[str, Any]) -> dict[str, Any]:
        place, heard = f"sweeps/{sweep['id']}", self.clock()
        with watching.interruptible_work(
            cancel=(lambda: self._post(f"{place}/cancel")) if self.cancel_on_interrupt else None,
            cancelled=f"Sweep {sweep['id']} is being cancelled.",
            left=f"Sweep {sweep['id']} goes on: tunepool sweeps show {sweep['id']}",
        ):
            while True:
                self._look(sweep)
                if sweep["status"] in OVER:
                    return sweep
                if self.deadline is not None and self.clock() >= self.deadline:
                    raise watching.NotInTime(f"Sweep {sweep['id']} is {sweep['status']}; it goes on.")
                self.sleep(POLL_SECONDS)
                try:
                    sweep, heard = self._get(place), self.clock()
                except (official.APIConnectionError, official.InternalServerError):
                    if self.clock() - heard > watching.PATIENCE_SECONDS:
                        raise

    def _look(self, sweep: dict[str, Any]) -> None:
        """Tell of trials whose state is another one than at the last look, and of what the sweep waits for."""
        self.seen(sweep)
        if sweep["detail"] and sweep["detail"] != self._detail:
            self.tell(f"{sweep['id']}: {sweep['detail']}")
        self._detail = sweep["detail"]
        for trial in sweep["trials"]:
            if self._told.get(trial["number"], "planned") != trial["state"]:
                self._told[trial["number"]] = trial["state"]
                why = f": {trial['reason']}" if trial["reason"] else ""
                self.tell(f"trial {trial['number']} of {sweep['id']} {trial['state']}{why}")

    def _best_of(self, sweep: dict[str, Any]) -> dict[str, Any]:
        if sweep["status"] == "failed":
            raise RunEnded(JOB_FAILED, f"{sweep['id']} failed: {sweep['error']['message']}")
        if sweep["status"] == "cancelled":
            raise RunEnded(ENDED_EARLY, f"{sweep['id']} was cancelled.")
        best: dict[str, Any] = sweep["trials"][sweep["best"]]
        return best
