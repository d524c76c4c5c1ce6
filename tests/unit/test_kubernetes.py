"""Kubernetes as a cluster: the official client, over HTTP, against an API server on the loopback.

What is asked of it, and how its words are read.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes import client

from shared.jobs.cluster_attempts import attempt_name
from shared.settings import Settings
from tests.certificates import Authority
from tests.fake_kubernetes import TOKEN, FakeKubernetes, api_server, waiting_container
from worker.attempt import dispatcher
from worker.attempt.engines import ClusterJobRequest, EngineAway, EngineRefused, EngineUnusable
from worker.attempt.kubernetes import Kubernetes, job_manifest

NAME = attempt_name("ftjob-0199", 1)
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"labels": {"team": "ml"}},
    "spec": {
        "backoffLimit": 6,
        "template": {"spec": {"containers": [{"name": "worker", "image": "tunepool-worker:1"}]}},
    },
}


@pytest.fixture
def fake() -> Iterator[FakeKubernetes]:
    with api_server() as server:
        yield server


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "job.json").write_text(json.dumps(JOB))
    return tmp_path


def cluster(fake: FakeKubernetes, account: Path, **settings: Any) -> Kubernetes:
    values = {"kubernetes_url": fake.url, "kubernetes_namespace": "ml", "kubernetes_job": account / "job.json"}
    return Kubernetes(Settings(**(values | settings)), account=account)


def test_an_attempt_becomes_one_job_of_its_name_that_is_never_tried_again_by_the_cluster(
    fake: FakeKubernetes, account: Path
) -> None:
    kubernetes = cluster(fake, account)

    kubernetes.submit(ClusterJobRequest(NAME, devices=2))
    kubernetes.submit(ClusterJobRequest(NAME, devices=2))  # "already exists" is success

    (job,) = fake.jobs.values()
    spec, container = job["spec"], job["spec"]["template"]["spec"]["containers"][0]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"], spec["suspend"]) == (0, "Failed", False)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert container["args"] == ["worker", "--attempt", NAME]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert job["metadata"]["labels"]["team"] == "ml"
    assert "kueue.x-k8s.io/queue-name" not in job["metadata"]["labels"]


def test_with_kueue_a_job_is_made_suspended_and_waits_in_the_words_of_its_workload(
    fake: FakeKubernetes, account: Path
) -> None:
    kubernetes = cluster(fake, account, kubernetes_queue="training")
    kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    job = fake.jobs[NAME]
    held = {"type": "QuotaReserved", "status": "False", "message": "insufficient unused quota for nvidia.com/gpu"}
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    fake.workloads.append({"metadata": {"labels": labels}, "status": {"conditions": [held]}})

    (sight,) = kubernetes.listed()

    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "training"
    assert job["spec"]["suspend"] is True
    assert sight.waits
    assert sight.words == "Kueue has not admitted it: insufficient unused quota for nvidia.com/gpu"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]},
            "Unschedulable: 0/3",
        ),
        (
            {"containerStatuses": [waiting_container("ImagePullBackOff", "no such\nimage")]},
            "ImagePullBackOff: no such image",
        ),
        ({}, "its pod is Pending"),
    ],
)
def test_a_pod_that_waits_says_why_in_the_words_of_scheduler_and_kubelet(
    fake: FakeKubernetes, account: Path, status: dict[str, Any], words: str
) -> None:
    kubernetes = cluster(fake, account)
    kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    assert [sight.words for sight in kubernetes.listed()] == ["it has no pod yet"]

    fake.pod(NAME, "Pending", **status)

    assert [(sight.waits, sight.words) for sight in kubernetes.listed()] == [(True, words)]


def test_what_runs_is_shown_with_its_node_page_by_page_and_strangers_jobs_are_not_ours(
    fake: FakeKubernetes, account: Path
) -> None:
    kubernetes = cluster(fake, account)
    names = [attempt_name("ftjob-0199", number) for number in (1, 2, 3)]
    for name in names:
        kubernetes.submit(ClusterJobRequest(name, devices=1))
        fake.pod(name, "Running")
    fake.jobs["theirs"] = {"metadata": {"name": "theirs", "labels": {}}, "spec": {}}
    fake.end(names[2], "Complete", "CompletionsReached")

    sights = kubernetes.listed()

    assert [(sight.name, sight.waits, sight.words) for sight in sights] == [
        (name, False, "its pod is Running on gpu-node-7") for name in names[:2]
    ]


def test_an_eviction_is_told_from_a_failure_by_the_pods_own_condition(fake: FakeKubernetes, account: Path) -> None:
    kubernetes = cluster(fake, account)
    assert kubernetes.fate(NAME).kind == "unknown"
    kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    assert kubernetes.fate(NAME).kind == "alive"

    fake.pod(NAME, "Failed")
    fake.end(NAME, "Failed", "BackoffLimitExceeded")
    assert kubernetes.fate(NAME).words == "the Job is Failed: BackoffLimitExceeded Job has ended."
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "bye"}
    fake.pod(NAME, "Failed", conditions=[disrupted])

    fate = kubernetes.fate(NAME)
    assert (fate.kind, fate.words) == ("taken", "PreemptionByScheduler: bye")


def test_a_withdrawn_job_takes_its_pods_along_and_one_that_has_changed_since_is_left_alone(
    fake: FakeKubernetes, account: Path
) -> None:
    kubernetes = cluster(fake, account)
    kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    (seen,) = kubernetes.listed()
    fake.pod(NAME, "Running")

    kubernetes.withdraw(seen)
    assert NAME in fake.jobs

    (seen,) = kubernetes.listed()
    kubernetes.withdraw(seen)
    assert (fake.jobs, fake.pods) == ({}, {})
    kubernetes.withdraw(seen)  # gone already


@pytest.mark.parametrize("code", [401, 429, 500, 503])
def test_an_api_server_that_cannot_serve_is_away_and_has_refused_nothing(
    fake: FakeKubernetes, account: Path, code: int
) -> None:
    fake.weather = (code, "etcdserver: leader changed")
    kubernetes = cluster(fake, account)

    with pytest.raises(EngineAway, match=f"{code} etcdserver"):
        kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    with pytest.raises(EngineAway):
        kubernetes.listed()


def test_an_answer_that_is_lost_was_a_submission_all_the_same(fake: FakeKubernetes, account: Path) -> None:
    kubernetes = cluster(fake, account)
    fake.lost = True
    with pytest.raises(EngineAway, match="cannot be reached"):
        kubernetes.submit(ClusterJobRequest(NAME, devices=1))
    fake.lost = False

    assert [sight.name for sight in kubernetes.listed()] == [NAME]


def test_a_quota_or_a_right_that_lacks_is_a_refusal_in_the_servers_words(fake: FakeKubernetes, account: Path) -> None:
    fake.weather = (403, "exceeded quota: compute")

    with pytest.raises(EngineRefused, match="403 exceeded quota: compute"):
        cluster(fake, account).submit(ClusterJobRequest(NAME, devices=1))


def test_a_token_that_the_kubelet_renews_is_read_anew(fake: FakeKubernetes, account: Path) -> None:
    kubernetes = cluster(fake, account)
    (account / "token").write_text("old")
    with pytest.raises(EngineAway, match="401"):
        kubernetes.listed()

    (account / "token").write_text(TOKEN)

    assert kubernetes.listed() == []


@pytest.mark.parametrize(
    "content", ["", "[]", '{"kind": "Pod", "spec": {}}', '{"kind": "Job", "spec": {"template": 1}}']
)
def test_a_file_that_is_no_job_keeps_the_dispatcher_from_starting(
    fake: FakeKubernetes, account: Path, content: str
) -> None:
    (account / "job.json").write_text(content)

    with pytest.raises(EngineUnusable, match="is no Job"):
        cluster(fake, account)
    with pytest.raises(EngineUnusable, match="names no file"):
        cluster(fake, account, kubernetes_job=None)


# ---- the official client, and what it leaves to us


def typed(fake: FakeKubernetes) -> client.ApiClient:
    """The client as anybody uses it, with its models."""
    configuration = client.Configuration()
    configuration.host, configuration.api_key = fake.url, {"authorization": f"Bearer {TOKEN}"}
    return client.ApiClient(configuration)


def test_the_clients_own_models_read_the_same_of_the_same_server(fake: FakeKubernetes, account: Path) -> None:
    """Our reading of answers is ours: a document that is none of Kubernetes', and a key misspelt, show here."""
    kubernetes = cluster(fake, account, kubernetes_queue="training")
    names = [attempt_name("ftjob-0199", number) for number in (1, 2, 3, 4)]
    for name in names:
        kubernetes.submit(ClusterJobRequest(name, devices=1))
    held = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}
    for name in names[:3]:
        fake.jobs[name]["spec"]["suspend"] = False
    fake.pod(names[0], "Pending", conditions=[held])
    fake.pod(names[1], "Running")
    fake.pod(names[2], "Failed", conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "Preempted"}])
    fake.end(names[2], "Failed", "BackoffLimitExceeded")
    ours = {sight.name: sight for sight in kubernetes.listed()}

    fake.page = 10
    batch, core = client.BatchV1Api(typed(fake)), client.CoreV1Api(typed(fake))
    jobs = {job.metadata.name: job for job in batch.list_namespaced_job("ml").items}
    pods = {pod.metadata.labels["batch.kubernetes.io/job-name"]: pod for pod in core.list_namespaced_pod("ml").items}

    assert list(jobs) == names
    assert {name for name, job in jobs.items() if not (job.status and job.status.conditions)} == ours.keys()
    assert [job.spec.suspend for job in jobs.values()] == [False, False, False, True]
    for name, sight in ours.items():
        assert sight.mark == f"{jobs[name].metadata.uid}/{jobs[name].metadata.resource_version}"
    (why,) = pods[names[0]].status.conditions
    assert ours[names[0]].words == f"{why.reason}: {why.message}"
    running = pods[names[1]]
    assert ours[names[1]].words == f"its pod is {running.status.phase} on {running.spec.node_name}"
    (ended,) = batch.read_namespaced_job(names[2], "ml").status.conditions
    assert (ended.type, ended.status, kubernetes.fate(names[2]).kind) == ("Failed", "True", "taken")


def leaves(document: Any, path: str = "") -> dict[str, str]:
    """Every value with its place; quantities are numbers to us and text to the client."""
    if isinstance(document, dict):
        return {name: value for key in document for name, value in leaves(document[key], f"{path}.{key}").items()}
    if isinstance(document, list):
        return {n: v for at, item in enumerate(document) for n, v in leaves(item, f"{path}[{at}]").items()}
    return {path: str(document)}


def test_a_manifest_has_no_field_that_the_clients_model_of_a_job_lacks() -> None:
    manifest = job_manifest(JOB, ClusterJobRequest(NAME, devices=2), Settings(kubernetes_queue="training"))
    door = client.ApiClient()

    model = door.deserialize(SimpleNamespace(data=json.dumps(manifest)), "V1Job")

    assert leaves(door.sanitize_for_serialization(model)) == leaves(manifest)


def test_a_manifest_that_the_schema_refuses_is_refused_by_the_server_in_its_words(
    fake: FakeKubernetes, account: Path
) -> None:
    job = json.loads(json.dumps(JOB))
    job["spec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    (account / "job.json").write_text(json.dumps(job))

    with pytest.raises(EngineRefused, match="imagePolicy"):
        cluster(fake, account).submit(ClusterJobRequest(NAME, devices=1))


def test_a_request_without_an_answer_is_asked_once_and_not_waited_for_longer_than_the_setting(
    fake: FakeKubernetes, account: Path
) -> None:
    """The client would ask three times more, and wait for ever where the setting is no whole number."""
    kubernetes = cluster(fake, account, cluster_command_seconds=0.5)
    fake.silent = threading.Event()
    try:
        with pytest.raises(EngineAway, match="ReadTimeoutError"):
            kubernetes.listed()
    finally:
        fake.silent.set()
    fake.silent, fake.lost = None, True
    with pytest.raises(EngineAway, match="ProtocolError"):
        kubernetes.listed()

    assert len(fake.asked) == 2


def test_the_exceptions_of_a_proxy_are_kept(
    fake: FakeKubernetes, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(EngineAway, match="cannot be reached"):
        cluster(fake, account).listed()

    monkeypatch.setenv("no_proxy", "127.0.0.1")

    assert cluster(fake, account).listed() == []


def test_by_tls_only_the_accounts_own_authority_is_believed(account: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    own, other = Authority.founded(tmp_path / "own"), Authority.founded(tmp_path / "other")
    with api_server(certificate=own.certify("localhost", tmp_path)) as fake:
        fake.url = fake.url.replace("127.0.0.1", "localhost")
        (account / "ca.crt").write_bytes(other.file.read_bytes())
        with pytest.raises(EngineAway, match="CERTIFICATE_VERIFY_FAILED"):
            cluster(fake, account).listed()

        (account / "ca.crt").write_bytes(own.file.read_bytes())

        assert cluster(fake, account).listed() == []


@pytest.mark.parametrize("content", [b"<html>a proxy</html>", b"[]", b"\xff\xfe"])
def test_an_answer_that_is_none_of_an_api_server_is_as_good_as_none(
    fake: FakeKubernetes, account: Path, content: bytes
) -> None:
    fake.instead = content

    with pytest.raises(EngineAway, match="answered what is no"):
        cluster(fake, account).listed()


def test_without_the_client_the_dispatcher_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "worker.attempt.kubernetes")
    monkeypatch.setitem(sys.modules, "kubernetes", None)

    with pytest.raises(EngineUnusable, match=r"not installed .*: pip install 'tunepool-server\[kubernetes\]'\.$"):
        dispatcher.kubernetes(Settings())
