"""Kubernetes as a cluster: one Job for each attempt, asked for over the documented REST API.

Plain HTTP and not the official client: four calls need no twelve further packages in every worker. Written against the
API reference of Kubernetes 1.30 to 1.37 (batch/v1 Job, core/v1 Pod) and of Kueue's `v1beta2` Workload.
"""

from __future__ import annotations

import json
import re
import ssl
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import httpx2

from shared.jobs.handover import read_name
from shared.settings import Settings
from worker.attempt.engines import EngineAway, EngineRefused, Fate, Order, Sight

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MANAGED: Final = "app.kubernetes.io/managed-by"
_OURS: Final = "tunepool-dispatcher"
_QUEUE: Final = "kueue.x-k8s.io/queue-name"
_PAGE: Final = 500
# A Job that has ended is kept for so long: its fate is asked for at the next look.
_KEPT_SECONDS: Final = 3600
# "Too Many Requests", timeouts, and what a proxy or an API server that starts answers: nothing is refused by that.
_AWAY: Final = frozenset({401, 408, 429, 500, 502, 503, 504})


class JobTemplateUnusable(Exception):
    """The file that TUNEPOOL_KUBERNETES_JOB names is no Job with a container; the message says what is wrong."""


class Kubernetes:
    """The namespace that this dispatcher's service account may use."""

    label = "Kubernetes"

    def __init__(self, settings: Settings, *, account: Path = _ACCOUNT) -> None:
        """Raises JobTemplateUnusable."""
        self._settings = settings
        self._account = account
        self._template = _template(settings.kubernetes_job)
        authority = account / "ca.crt"
        context = ssl.create_default_context(cafile=str(authority) if authority.exists() else None)
        self._client = httpx2.Client(
            base_url=settings.kubernetes_url, verify=context, timeout=settings.cluster_command_seconds
        )
        self._jobs = f"/apis/batch/v1/namespaces/{settings.kubernetes_namespace}/jobs"
        self._pods = f"/api/v1/namespaces/{settings.kubernetes_namespace}/pods"
        self._workloads = f"/apis/kueue.x-k8s.io/v1beta2/namespaces/{settings.kubernetes_namespace}/workloads"

    def submit(self, order: Order) -> str:
        """See `Engine`. A Job of that name is this very attempt's, so that "already exists" is success."""
        answer = self._ask("POST", self._jobs, json=job_manifest(self._template, order, self._settings))
        if answer.status_code not in (200, 201, 202, 409):
            raise EngineRefused(_message(answer))
        return order.name

    def listed(self) -> list[Sight]:
        jobs = [job for job in self._all(self._jobs) if read_name(_name(job)) is not None and _ended(job) is None]
        pods = {_label(pod, "batch.kubernetes.io/job-name"): pod for pod in self._all(self._pods)} if jobs else {}
        return [self._sight(job, pods.get(_name(job))) for job in jobs]

    def _sight(self, job: dict[str, Any], pod: dict[str, Any] | None) -> Sight:
        name = _name(job)
        mark = f"{job['metadata'].get('uid', '')}/{job['metadata'].get('resourceVersion', '')}"
        if job.get("spec", {}).get("suspend"):
            words = f"Kueue has not admitted it: {self._kueue_words(job)}"
            return Sight(name, name, waits=True, words=_plain(words), mark=mark)
        phase = "" if pod is None else pod.get("status", {}).get("phase", "")
        if phase in ("", "Pending"):
            return Sight(name, name, waits=True, words=_plain(_pod_words(pod)), mark=mark)
        node = "" if pod is None else pod.get("spec", {}).get("nodeName", "")
        return Sight(name, name, waits=False, words=_plain(f"its pod is {phase} on {node}"), mark=mark)

    def _kueue_words(self, job: dict[str, Any]) -> str:
        """Why its Workload waits. A Kueue that is not there, or not ours to read, has no words."""
        selector = f"kueue.x-k8s.io/job-uid={job['metadata'].get('uid', '')}"
        answer = self._ask("GET", self._workloads, params={"labelSelector": selector})
        items = _document(answer).get("items", []) if answer.status_code == 200 else []
        conditions = [held for item in items for held in item.get("status", {}).get("conditions", [])]
        waiting = [held for held in conditions if held.get("status") == "False" and held.get("message")]
        return str(waiting[0]["message"]) if waiting else "no workload of it says why"

    def fate(self, name: str) -> Fate:
        answer = self._ask("GET", f"{self._jobs}/{name}")
        if answer.status_code == 404:
            return Fate("unknown", "there is no such Job")
        if answer.status_code != 200:
            raise EngineAway(_message(answer))
        ended = _ended(_document(answer))
        if ended is None:
            return Fate("alive", "the Job is there, and the list lacks it")
        for pod in self._all(self._pods, more=f"batch.kubernetes.io/job-name={name}"):
            for held in pod.get("status", {}).get("conditions", []):
                if held.get("type") == "DisruptionTarget" and held.get("status") == "True":
                    return Fate("taken", _plain(f"{held.get('reason', '')}: {held.get('message', '')}"))
        return Fate("ended", _plain(ended))

    def withdraw(self, sight: Sight) -> None:
        uid, _, version = sight.mark.partition("/")
        same = {"uid": uid, **({"resourceVersion": version} if sight.waits else {})}
        wish = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background", "preconditions": same}
        answer = self._ask("DELETE", f"{self._jobs}/{sight.name}", json=wish)
        # 409: it has changed since it was seen; the next look sees it anew.
        if answer.status_code not in (200, 202, 404, 409):
            raise EngineAway(_message(answer))

    def _all(self, path: str, *, more: str = "") -> list[dict[str, Any]]:
        """All of ours of a kind, page by page."""
        selector = f"{_MANAGED}={_OURS}" + (f",{more}" if more else "")
        items, following = list[dict[str, Any]](), ""
        while True:
            params = {"labelSelector": selector, "limit": _PAGE, **({"continue": following} if following else {})}
            answer = self._ask("GET", path, params=params)
            if answer.status_code != 200:  # 410: the list has moved on meanwhile; asked again with the next look
                raise EngineAway(_message(answer))
            page = _document(answer)
            items += page.get("items", [])
            following = page.get("metadata", {}).get("continue", "")
            if not following:
                return items

    def _ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        token = self._account / "token"
        # Read each time: the kubelet renews it.
        headers = {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}
        try:
            answer = self._client.request(method, path, headers=headers, **more)
        except httpx2.HTTPError as error:
            raise EngineAway(f"the API server cannot be reached ({type(error).__name__})") from error
        if answer.status_code in _AWAY:
            raise EngineAway(_message(answer))
        return answer


def _template(path: Path | None) -> dict[str, Any]:
    if path is None:
        raise JobTemplateUnusable("TUNEPOOL_KUBERNETES_JOB names no file")
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        containers = job["spec"]["template"]["spec"]["containers"]
        if job["kind"] != "Job" or not containers[0]["image"]:
            raise KeyError("image")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise JobTemplateUnusable(f"{path} is no Job with a container that has an image, in JSON: {error}") from error
    return dict(job)


def job_manifest(template: dict[str, Any], order: Order, settings: Settings) -> dict[str, Any]:
    """The operator's Job with what must hold: its name, one try, the attempt's command, the devices."""
    job = deepcopy(template)
    labels = {_MANAGED: _OURS, "tunepool/attempt": order.name}
    queue = {_QUEUE: settings.kubernetes_queue} if settings.kubernetes_queue else {}
    job["metadata"] = {
        **job.get("metadata", {}),
        "name": order.name,
        "labels": {**job.get("metadata", {}).get("labels", {}), **labels, **queue},
    }
    # A second pod of the attempt would find it taken; a pod is replaced only once the first is gone.
    spec = {"backoffLimit": 0, "completions": 1, "parallelism": 1, "podReplacementPolicy": "Failed"}
    job["spec"] |= {**spec, "ttlSecondsAfterFinished": _KEPT_SECONDS, "suspend": bool(settings.kubernetes_queue)}
    pod = job["spec"]["template"]
    pod["metadata"] = {**pod.get("metadata", {}), "labels": {**pod.get("metadata", {}).get("labels", {}), **labels}}
    pod["spec"]["restartPolicy"] = "Never"
    container = pod["spec"]["containers"][0]
    container["args"] = ["worker", "--attempt", order.name]
    container.setdefault("command", ["tunepool-server"])
    if settings.cluster_device_kind != "cpu":
        resources = container.setdefault("resources", {})
        resources["limits"] = {**resources.get("limits", {}), settings.kubernetes_resource: order.devices}
    return job


def _name(item: dict[str, Any]) -> str:
    return str(item.get("metadata", {}).get("name", ""))


def _label(item: dict[str, Any], label: str) -> str:
    return str(item.get("metadata", {}).get("labels", {}).get(label, ""))


def _ended(job: dict[str, Any]) -> str | None:
    """How a Job ended, in its condition's words; None while it has not."""
    for held in job.get("status", {}).get("conditions", []):
        if held.get("type") in ("Complete", "Failed") and held.get("status") == "True":
            return f"the Job is {held['type']}: {held.get('reason', '')} {held.get('message', '')}".strip()
    return None


def _pod_words(pod: dict[str, Any] | None) -> str:
    """Why nothing runs: the scheduler's words, else those of the container that cannot start."""
    if pod is None:
        return "it has no pod yet"
    status = pod.get("status", {})
    for held in status.get("conditions", []):
        if held.get("type") == "PodScheduled" and held.get("status") == "False":
            return f"{held.get('reason', 'Unschedulable')}: {held.get('message', '')}"
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason', '')}: {waiting.get('message', '')}"
    return "its pod is Pending"


def _document(answer: httpx2.Response) -> dict[str, Any]:
    try:
        document = answer.json()
    except ValueError as error:
        raise EngineAway("the API server answered what is no JSON") from error
    if not isinstance(document, dict):
        raise EngineAway("the API server answered what is no object")
    return document


def _message(answer: httpx2.Response) -> str:
    """The words of a `Status`, else the code."""
    try:
        words = answer.json().get("message") or ""
    except (ValueError, AttributeError):
        words = ""
    return _plain(f"{answer.status_code} {words}")


def _plain(words: str) -> str:
    """One line, short enough for an event."""
    return re.sub(r"[^\x20-\x7e]", " ", words).strip(": ")[:300]
