"""Speaks MLflow's REST interface 2.0 (mlflow.org, "REST API"), which servers of MLflow 2 and 3 have.

Not by MLflow's client: it resolves names itself and follows redirects, and the address is a user's. So each request
goes through `pinned_line`, as webhooks do.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from shared.chores.points import CurvePoint
from shared.chores.trackings import Tracking, TrackingResult
from shared.settings import Settings
from shared.tenants import outward, project_secrets
from worker.chores import pinned_line
from worker.chores.pinned_line import Unanswered

# The interface's own limits of one request.
BATCH_METRICS: Final = 1000
BATCH_PARAMS: Final = 100
PARAM_CHARACTERS: Final = 500
ANSWER_BYTES: Final = 4 * 1024 * 1024
JOB_TAG: Final = "tunepool.job_id"
PLACE_TAG: Final = "tunepool.integration"
_STATES: Final = {"succeeded": "FINISHED", "failed": "FAILED", "cancelled": "KILLED"}


class MlflowFailed(Exception):
    """The server did not take it; says why, for the job's owner."""


class MlflowLine:
    """Requests to one tracking server. Every method raises MlflowFailed."""

    def __init__(self, secrets: Mapping[str, str], settings: Settings, *, between: Callable[[], None]) -> None:
        self.base = secrets[project_secrets.MLFLOW_TRACKING_URI].rstrip("/")
        self._headers = {"Content-Type": "application/json", **_authorization(secrets)}
        self._allowed = outward.networks(settings.webhook_networks)
        self._seconds = settings.webhook_seconds
        self._between = between

    def feed(self, tracking: Tracking) -> TrackingResult:
        """Bring the points there, those alone that the run has not. Returns the run."""
        try:
            return self._feed(tracking)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise MlflowFailed("It answered otherwise than MLflow's REST interface 2.0 does.") from error

    def _feed(self, tracking: Tracking) -> TrackingResult:
        experiment = self._experiment(tracking.options["experiment"])
        run_id = tracking.run_id or self._run(tracking, experiment)
        if tracking.points:
            self._log(run_id, tracking.points)
        if tracking.final:
            self._end(run_id, tracking)
        return TrackingResult(run_id=run_id, url=f"{self.base}/#/experiments/{quote(experiment)}/runs/{quote(run_id)}")

    def _experiment(self, name: str) -> str:
        known = self._ask("GET", f"experiments/get-by-name?experiment_name={quote(name, safe='')}", lacks=True)
        if known is None:
            return str(self._ask_for("experiments/create", {"name": name})["experiment_id"])
        return str(known["experiment"]["experiment_id"])

    def _run(self, tracking: Tracking, experiment: str) -> str:
        """The job's run, made once: a worker that died may have made it."""
        mine = {JOB_TAG: tracking.job_id, PLACE_TAG: str(tracking.place)}
        conditions = " and ".join(f"tags.`{name}` = '{value}'" for name, value in mine.items())
        runs = self._ask_for("runs/search", {"experiment_ids": [experiment], "filter": conditions, "max_results": 1})
        if runs.get("runs"):
            return str(runs["runs"][0]["info"]["run_id"])
        tags = {**tracking.options.get("tags", {}), **mine, "mlflow.source.name": "tunepool"}
        made = self._ask_for(
            "runs/create",
            {
                "experiment_id": experiment,
                "run_name": tracking.run_name,
                "start_time": _milliseconds(tracking.points[0].at) if tracking.points else 0,
                "tags": [{"key": name, "value": value} for name, value in tags.items()],
            },
        )
        run_id = str(made["run"]["info"]["run_id"])
        params = [{"key": name, "value": value} for name, value in flat(tracking.facts).items()]
        for first in range(0, len(params), BATCH_PARAMS):
            self._ask_for("runs/log-batch", {"run_id": run_id, "params": params[first : first + BATCH_PARAMS]})
        return run_id

    def _log(self, run_id: str, points: Sequence[CurvePoint]) -> None:
        known = self._ask("GET", f"runs/get?run_id={quote(run_id, safe='')}") or {}
        held = known["run"].get("data", {}).get("metrics", ())
        latest = {metric["key"]: int(metric.get("step", 0)) for metric in held}
        metrics = [
            {"key": name, "value": value, "timestamp": _milliseconds(point.at), "step": point.step}
            for point in points
            for name, value in point.figures.items()
            if point.step > latest.get(name, -1)
        ]
        for first in range(0, len(metrics), BATCH_METRICS):
            self._ask_for("runs/log-batch", {"run_id": run_id, "metrics": metrics[first : first + BATCH_METRICS]})

    def _end(self, run_id: str, tracking: Tracking) -> None:
        tags = [{"key": f"tunepool.{name}", "value": str(value)} for name, value in tracking.ending.items() if value]
        self._ask_for("runs/log-batch", {"run_id": run_id, "tags": tags})
        end = _milliseconds(tracking.points[-1].at) if tracking.points else None
        state = {"run_id": run_id, "status": _STATES[tracking.ending["status"]]}
        self._ask_for("runs/update", state if end is None else {**state, "end_time": end})

    def _ask_for(self, path: str, document: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", path, document) or {}

    def _ask(
        self, method: str, path: str, document: dict[str, Any] | None = None, *, lacks: bool = False
    ) -> dict[str, Any] | None:
        """The answer's document; with `lacks`, None where the server says that there is no such thing."""
        self._between()
        url = f"{self.base}/api/2.0/mlflow/{path}"
        body = None if document is None else json.dumps(document).encode()
        try:
            status, read = pinned_line.exchange(
                method,
                url,
                body,
                self._headers,
                allowed=self._allowed,
                seconds=self._seconds,
                answer_bytes=ANSWER_BYTES,
            )
        except Unanswered as error:
            raise MlflowFailed(str(error)) from error
        if status == 404 and lacks and _code(read) == "RESOURCE_DOES_NOT_EXIST":
            return None
        if status != 200:
            raise MlflowFailed(f"It answered {status} {_code(read)}".rstrip() + f" to {path.partition('?')[0]}.")
        return _object(read)


def _authorization(secrets: Mapping[str, str]) -> dict[str, str]:
    """As MLflow's client has it: a token, or else a name and a password."""
    token = secrets.get(project_secrets.MLFLOW_TRACKING_TOKEN)
    if token:
        return {"Authorization": f"Bearer {token}"}
    user = secrets.get(project_secrets.MLFLOW_TRACKING_USERNAME)
    if not user:
        return {}
    pair = f"{user}:{secrets.get(project_secrets.MLFLOW_TRACKING_PASSWORD, '')}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under dotted names, as texts that fit MLflow's params; what is null is left out."""
    params: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            params |= flat(value, f"{prefix}{name}.")
        elif value is not None:
            params[f"{prefix}{name}"] = str(value)[:PARAM_CHARACTERS]
    return params


def _milliseconds(at: float) -> int:
    return int(at * 1000)


def _code(read: bytes) -> str:
    """MLflow's name of an error, and nothing else of a stranger's answer."""
    try:
        code = json.loads(read).get("error_code", "")
    except (ValueError, AttributeError):
        return ""
    return code if isinstance(code, str) and code.isidentifier() and len(code) <= 64 else ""


def _object(read: bytes) -> dict[str, Any]:
    try:
        document = json.loads(read)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise MlflowFailed("It answered with something that is no JSON object; is this an MLflow server?")
    return document
