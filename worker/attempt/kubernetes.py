"""Kubernetes as a cluster: one Job for each attempt, asked for through the official client (docs/adr/0016).

Its calls, its TLS and its errors; answers are read as JSON, so that a field which a newer API server adds or leaves out
stops nothing. Written against the API reference of Kubernetes 1.30 to 1.37 (batch/v1 Job, core/v1 Pod) and of Kueue's
`v1beta2` Workload. The client is an extra: `dispatcher.py` imports this module only where it is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Final
from urllib.request import getproxies

from kubernetes import client
from urllib3.exceptions import HTTPError

from shared.jobs.cluster_attempts import read_name
from shared.settings import Settings
from worker.attempt.engines import (
    ClusterJobEnd,
    ClusterJobRequest,
    ClusterJobState,
    EngineAway,
    EngineRefused,
    EngineUnusable,
)

_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_MANAGED: Final = "app.kubernetes.io/managed-by"
_OURS: Final = "tunepool-dispatcher"
_QUEUE: Final = "kueue.x-k8s.io/queue-name"
_PAGE: Final = 500
# A Job that has ended is kept for so long: its fate is asked for at the next look.
_KEPT_SECONDS: Final = 3600
# "Too Many Requests", timeouts, and what a proxy or an API server that starts answers: nothing is refused by that. The
# client says 0 where TLS fails.
_AWAY: Final = frozenset({0, 401, 408, 429, 500, 502, 503, 504})


class Kubernetes:
    """The namespace that this dispatcher's service account may use."""

    label = "Kubernetes"

    def __init__(self, settings: Settings, *, account: Path = _ACCOUNT) -> None:
        """Raises EngineUnusable."""
        self._settings = settings
        self._account = account
        self._template = _template(settings.kubernetes_job)
        self._configuration = _configuration(settings, account)
        door = client.ApiClient(self._configuration)
        self._batch, self._core = client.BatchV1Api(door), client.CoreV1Api(door)
        self._custom = client.CustomObjectsApi(door)

    def submit(self, order: ClusterJobRequest) -> str:
        """See `Engine`. A Job of that name is this very attempt's, so that "already exists" is success."""
        job = job_manifest(self._template, order, self._settings)
        try:
            self._ask(self._batch.create_namespaced_job, body=job)
        except client.ApiException as error:
            if error.status != 409:
                raise EngineRefused(_message(error)) from error
        return order.name

    def listed(self) -> list[ClusterJobState]:
        jobs = [job for job in self._all(self._batch.list_namespaced_job) if _is_open(job)]
        pods = self._all(self._core.list_namespaced_pod) if jobs else []
        by_job = {_label(pod, "batch.kubernetes.io/job-name"): pod for pod in pods}
        return [self._sight(job, by_job.get(_name(job))) for job in jobs]

    def _sight(self, job: dict[str, Any], pod: dict[str, Any] | None) -> ClusterJobState:
        name = _name(job)
        mark = f"{job['metadata'].get('uid', '')}/{job['metadata'].get('resourceVersion', '')}"
        if job.get("spec", {}).get("suspend"):
            words = f"Kueue has not admitted it: {self._kueue_words(job)}"
            return ClusterJobState(name, name, waits=True, words=_plain(words), mark=mark)
        phase = "" if pod is None else pod.get("status", {}).get("phase", "")
        if phase in ("", "Pending"):
            return ClusterJobState(name, name, waits=True, words=_plain(_pod_words(pod)), mark=mark)
        node = "" if pod is None else pod.get("spec", {}).get("nodeName", "")
        return ClusterJobState(name, name, waits=False, words=_plain(f"its pod is {phase} on {node}"), mark=mark)

    def _kueue_words(self, job: dict[str, Any]) -> str:
        """Why its Workload waits. A Kueue that is not there, or not ours to read, has no words."""
        selector = f"kueue.x-k8s.io/job-uid={job['metadata'].get('uid', '')}"
        kind = {"group": "kueue.x-k8s.io", "version": "v1beta2", "plural": "workloads"}
        try:
            page = self._ask(self._custom.list_namespaced_custom_object, **kind, label_selector=selector)
        except client.ApiException:
            page = {}
        conditions = [held for item in page.get("items", []) for held in item.get("status", {}).get("conditions", [])]
        waiting = [held for held in conditions if held.get("status") == "False" and held.get("message")]
        return str(waiting[0]["message"]) if waiting else "no workload of it says why"

    def fate(self, name: str) -> ClusterJobEnd:
        try:
            job = self._ask(self._batch.read_namespaced_job, name=name)
        except client.ApiException as error:
            if error.status == 404:
                return ClusterJobEnd("unknown", "there is no such Job")
            raise EngineAway(_message(error)) from error
        ended = _ended(job)
        if ended is None:
            return ClusterJobEnd("alive", "the Job is there, and the list lacks it")
        for pod in self._all(self._core.list_namespaced_pod, more=f"batch.kubernetes.io/job-name={name}"):
            for held in pod.get("status", {}).get("conditions", []):
                if held.get("type") == "DisruptionTarget" and held.get("status") == "True":
                    return ClusterJobEnd("taken", _plain(f"{held.get('reason', '')}: {held.get('message', '')}"))
        return ClusterJobEnd("ended", _plain(ended))

    def withdraw(self, sight: ClusterJobState) -> None:
        uid, _, version = sight.mark.partition("/")
        same = client.V1Preconditions(uid=uid, resource_version=version if sight.waits else None)
        wish = client.V1DeleteOptions(propagation_policy="Background", preconditions=same)
        try:
            self._ask(self._batch.delete_namespaced_job, name=sight.name, body=wish)
        except client.ApiException as error:
            if error.status not in (404, 409):  # 409: it has changed since it was seen; the next look sees it anew
                raise EngineAway(_message(error)) from error

    def _all(self, call: Callable[..., Any], *, more: str = "") -> list[dict[str, Any]]:
        """All of ours of a kind, page by page."""
        selector = f"{_MANAGED}={_OURS}" + (f",{more}" if more else "")
        items, following = list[dict[str, Any]](), ""
        while True:
            onward = {"_continue": following} if following else {}
            try:
                page = self._ask(call, label_selector=selector, limit=_PAGE, **onward)
            except client.ApiException as error:  # 410: the list has moved on; asked again with the next look
                raise EngineAway(_message(error)) from error
            items += page.get("items", [])
            following = page.get("metadata", {}).get("continue", "")
            if not following:
                return items

    def _ask(self, call: Callable[..., Any], **more: Any) -> dict[str, Any]:
        """One call of the client. Raises EngineAway, and ApiException for a refusal by an API server that serves."""
        token = self._account / "token"
        # Read each time: the kubelet renews it.
        self._configuration.api_key = {"authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}
        seconds = self._settings.cluster_command_seconds
        try:
            # Not one number: the client takes a whole one only, and leaves a fraction out.
            answer = call(
                namespace=self._settings.kubernetes_namespace,
                _preload_content=False,
                _request_timeout=(seconds, seconds),
                **more,
            )
            return _document(answer.data)
        except client.ApiException as error:
            if error.status in _AWAY:
                raise EngineAway(_message(error)) from error
            raise
        except HTTPError as error:
            raise EngineAway(f"the API server cannot be reached ({type(error).__name__})") from error


def _configuration(settings: Settings, account: Path) -> client.Configuration:
    configuration = client.Configuration()
    configuration.host = settings.kubernetes_url.rstrip("/")
    # The client reads the variables for proxies, and forgets the one that names the exceptions.
    configuration.no_proxy = getproxies().get("no")
    authority = account / "ca.crt"
    configuration.ssl_ca_cert = str(authority) if authority.exists() else None
    # The next look is the next try: three in a row within one would hold up the others.
    configuration.retries = False
    return configuration


def _template(path: Path | None) -> dict[str, Any]:
    if path is None:
        raise EngineUnusable("TUNEPOOL_KUBERNETES_JOB names no file")
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        containers = job["spec"]["template"]["spec"]["containers"]
        if job["kind"] != "Job" or not containers[0]["image"]:
            raise KeyError("image")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineUnusable(f"{path} is no Job with a container that has an image, in JSON: {error}") from error
    return dict(job)


def job_manifest(template: dict[str, Any], order: ClusterJobRequest, settings: Settings) -> dict[str, Any]:
    """The operator's Job with what must hold: its name, one try, the attempt's command, the devices."""
    job = deepcopy(template)
    job.setdefault("apiVersion", "batch/v1")
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
    container.setdefault("name", "worker")
    container.setdefault("command", ["tunepool-server"])
    if settings.cluster_device_kind != "cpu":
        resources = container.setdefault("resources", {})
        resources["limits"] = {**resources.get("limits", {}), settings.kubernetes_resource: order.devices}
    return job


def _name(item: dict[str, Any]) -> str:
    return str(item.get("metadata", {}).get("name", ""))


def _label(item: dict[str, Any], label: str) -> str:
    return str(item.get("metadata", {}).get("labels", {}).get(label, ""))


def _is_open(job: dict[str, Any]) -> bool:
    """Whether it is an attempt's, and has not ended."""
    return read_name(_name(job)) is not None and _ended(job) is None


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


def _document(content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise EngineAway("the API server answered what is no JSON") from error
    if not isinstance(document, dict):
        raise EngineAway("the API server answered what is no object")
    return document


def _message(error: client.ApiException) -> str:
    """The words of a `Status`, else the code and its reason."""
    try:
        words = json.loads(error.body or "").get("message") or ""
    except (ValueError, AttributeError):
        words = error.reason or ""
    return _plain(f"{error.status} {words}")


def _plain(words: str) -> str:
    """One line, short enough for an event."""
    return re.sub(r"[^\x20-\x7e]", " ", words).strip(": ")[:300]
