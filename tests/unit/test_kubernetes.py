"""Kubernetes as a cluster, against an API server on the loopback: what is asked of it, and how its words are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.jobs.handover import attempt_name
from shared.settings import Settings
from tests.fake_kubernetes import TOKEN, FakeKubernetes, api_server
from worker.attempt.engines import EngineAway, EngineRefused, Order
from worker.attempt.kubernetes import JobTemplateUnusable, Kubernetes

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

    kubernetes.submit(Order(NAME, devices=2))
    kubernetes.submit(Order(NAME, devices=2))  # "already exists" is success

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
    kubernetes.submit(Order(NAME, devices=1))
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
            {
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such\nimage"}}}
                ]
            },
            "ImagePullBackOff: no such image",
        ),
        ({}, "its pod is Pending"),
    ],
)
def test_a_pod_that_waits_says_why_in_the_words_of_scheduler_and_kubelet(
    fake: FakeKubernetes, account: Path, status: dict[str, Any], words: str
) -> None:
    kubernetes = cluster(fake, account)
    kubernetes.submit(Order(NAME, devices=1))
    assert [sight.words for sight in kubernetes.listed()] == ["it has no pod yet"]

    fake.pod(NAME, "Pending", **status)

    assert [(sight.waits, sight.words) for sight in kubernetes.listed()] == [(True, words)]


def test_what_runs_is_shown_with_its_node_page_by_page_and_strangers_jobs_are_not_ours(
    fake: FakeKubernetes, account: Path
) -> None:
    kubernetes = cluster(fake, account)
    names = [attempt_name("ftjob-0199", number) for number in (1, 2, 3)]
    for name in names:
        kubernetes.submit(Order(name, devices=1))
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
    kubernetes.submit(Order(NAME, devices=1))
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
    kubernetes.submit(Order(NAME, devices=1))
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
        kubernetes.submit(Order(NAME, devices=1))
    with pytest.raises(EngineAway):
        kubernetes.listed()


def test_an_answer_that_is_lost_was_a_submission_all_the_same(fake: FakeKubernetes, account: Path) -> None:
    kubernetes = cluster(fake, account)
    fake.lost = True
    with pytest.raises(EngineAway, match="cannot be reached"):
        kubernetes.submit(Order(NAME, devices=1))
    fake.lost = False

    assert [sight.name for sight in kubernetes.listed()] == [NAME]


def test_a_quota_or_a_right_that_lacks_is_a_refusal_in_the_servers_words(fake: FakeKubernetes, account: Path) -> None:
    fake.weather = (403, "exceeded quota: compute")

    with pytest.raises(EngineRefused, match="403 exceeded quota: compute"):
        cluster(fake, account).submit(Order(NAME, devices=1))


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

    with pytest.raises(JobTemplateUnusable, match="is no Job"):
        cluster(fake, account)
    with pytest.raises(JobTemplateUnusable, match="names no file"):
        cluster(fake, account, kubernetes_job=None)
