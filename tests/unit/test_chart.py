"""The Helm chart: what it renders is valid, complete and closed, in each combination. No cluster is asked."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from shared.settings import Settings
from standalone.main import app
from tests.charts import BUNDLED, CHART, H100, OUTSIDE, documents, sdk

helm = sdk()
kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[2]
EVERYTHING: dict[str, Any] = {
    **OUTSIDE,
    "image": {"pullSecrets": ["registry"], "api": {"digest": "sha256:" + "0" * 64}},
    "settings": {"TUNEPOOL_LINK_SECONDS": "600"},
    "publicUrl": "https://tune.example.com",
    "models": "[models.house]\npath = '/models/house'\n",
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/tunepool"}},
    "api": {"autoscaling": {"enabled": True}, "nodeSelector": {"disk": "ssd"}},
    "ingress": {"enabled": True, "host": "tune.example.com", "className": "nginx", "tlsSecret": "tune-tls"},
    "workers": {
        "h100": {"gpus": 8, "nodeSelector": {"gpu": "h100"}, "scaling": {"enabled": True, **H100}},
        "cpu": {"gpus": 0, "state": {"size": ""}, "cacheClaim": "models", "settings": {"TUNEPOOL_CPU_SLOTS": "2"}},
    },
    "playground": {"enabled": True, "cacheClaim": "models"},
    "dispatcher": {"enabled": True, "queue": "training", "deviceBytes": H100["deviceBytes"], "deviceCapability": 90},
    "networkPolicy": {"ingressFrom": [{"namespaceSelector": {"matchLabels": {"team": "ml"}}}]},
    "traces": {"endpoint": "http://collector.telemetry:4318"},
    "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}, "rules": {"enabled": True}},
}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "external services": OUTSIDE,
    "bundled services": BUNDLED,
    "everything": EVERYTHING,
    "bundled and scaled": {**BUNDLED, "workers": {"gpu": {"scaling": {"enabled": True, **H100}}}},
    "Kueue alone": {**OUTSIDE, "workers": {}, "dispatcher": EVERYTHING["dispatcher"]},
    "a cluster without Kueue": {**OUTSIDE, "dispatcher": {"enabled": True, "deviceBytes": 2**36}},
    "no GPU": {**OUTSIDE, "workers": {"gpu": {"gpus": 0}}, "dispatcher": {"enabled": False}},
    "identity of the cloud": {**OUTSIDE, "storage": {"url": "gs://bucket", "keys": False}},
    "no network policies": {**OUTSIDE, "networkPolicy": {"enabled": False}},
    "migrated by an init container": {**OUTSIDE, "migrations": {"mode": "init"}},
}
BUNDLED_PARTS = ("-postgres", "-valkey", "-s3")
# What kubernetes-validate has no schema for: the fields that KEDA's and the Prometheus operator's references demand.
CUSTOM: dict[str, dict[str, Any]] = {
    "ScaledObject": {"required": ["scaleTargetRef", "triggers"], "properties": {"maxReplicaCount": {"minimum": 1}}},
    "TriggerAuthentication": {"required": ["secretTargetRef"]},
    "ServiceMonitor": {"required": ["selector", "endpoints"]},
    "PrometheusRule": {"required": ["groups"]},
}


@cache
def validate(document: str, version: str) -> None:
    """Raises what kubernetes-validate raises. Most documents are the same in most combinations."""
    kubernetes_validate.validate(json.loads(document), version, strict=True)


def pods(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> the pod that it makes, that of an attempt included."""
    made = {}
    for document in documents(values):
        if document["kind"] in ("Deployment", "StatefulSet", "Job"):
            made[document["metadata"]["name"]] = document["spec"]["template"]["spec"]
        if "job.json" in document.get("data", {}):
            made["attempt"] = json.loads(document["data"]["job.json"])["spec"]["template"]["spec"]
    return made


def variables(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for container in pod["containers"] for entry in container["env"]}


@pytest.mark.parametrize("version", ["1.30.0", "1.37.0"])
@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_each_combination_is_valid_for_the_oldest_and_the_newest_kubernetes(
    values: dict[str, Any], version: str
) -> None:
    made = documents(values)

    assert len({(document["kind"], document["metadata"]["name"]) for document in made}) == len(made)
    for document in made:
        if document["kind"] in CUSTOM:
            jsonschema.validate(document["spec"], CUSTOM[document["kind"]])
        else:
            validate(json.dumps(document), version)


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_the_chart_has_nothing_that_helm_warns_of(values: dict[str, Any]) -> None:
    report = helm.lint(str(CHART), values, strict=True)

    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({**OUTSIDE, "replicas": 2}, "replicas"),
        ({**OUTSIDE, "api": {"replica": 2}}, "replica"),
        ({**OUTSIDE, "api": {"replicas": "two"}}, "replicas"),
        ({**OUTSIDE, "workers": {"gpu": {"gpu": 8}}}, "gpu"),
        ({**OUTSIDE, "workers": {"GPU!": {}}}, "GPU!"),
        ({**OUTSIDE, "workers": {"gpu": {"scaling": {"min": 1}}}}, "min"),
        ({**OUTSIDE, "settings": {"TUNEPOOL_SIGNING_SECRET": "x"}}, "TUNEPOOL_SIGNING_SECRET"),
        ({**OUTSIDE, "settings": {"LD_PRELOAD": "x"}}, "LD_PRELOAD"),
        ({**OUTSIDE, "settings": {"OTEL_EXPORTER_OTLP_HEADERS": "authorization=x"}}, "OTEL_EXPORTER_OTLP_HEADERS"),
        ({**OUTSIDE, "traces": {"endpoint": "collector:4318"}}, "endpoint"),
        ({**OUTSIDE, "migrations": {"mode": "later"}}, "mode"),
        ({"storage": {"url": "s3://bucket"}}, "existingSecret is empty"),
        ({"existingSecret": "tunepool"}, "storage.url is empty"),
        ({**OUTSIDE, "dispatcher": {"enabled": True}}, "dispatcher.deviceBytes is 0"),
        ({**OUTSIDE, "ingress": {"enabled": True}}, "ingress.host is empty"),
        ({**OUTSIDE, "workers": {"gpu": {"scaling": {"enabled": True}}}}, "workers.gpu.scaling.deviceBytes is 0"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_name(values: dict[str, Any], word: str) -> None:
    with pytest.raises(helm.HelmError, match=re.escape(word)):
        documents(values)


def test_every_value_has_its_place_in_the_schema_and_no_other_is_taken() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def open_places(node: dict[str, Any], value: Any, path: str) -> list[str]:
        if not isinstance(value, dict) or "properties" not in node:
            return []
        lacking = [f"{path}.{name}" for name in value if name not in node["properties"]]
        if node.get("additionalProperties") is not False:
            lacking.append(path)
        return lacking + [
            place
            for name, part in value.items()
            if name in node["properties"]
            for place in open_places(node["properties"][name], part, f"{path}.{name}")
        ]

    assert open_places(schema, values, "values") == []
    assert schema["properties"]["workers"]["additionalProperties"] == schema["properties"]["workerDefaults"]


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_no_secret_stands_in_a_manifest_and_every_setting_is_one(values: dict[str, Any]) -> None:
    known = {f"TUNEPOOL_{name.upper()}" for name in Settings.model_fields}
    known |= {str(field.validation_alias) for field in Settings.model_fields.values() if field.validation_alias}
    known |= {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_HEADERS"}  # the standard's own
    ours = {name: pod for name, pod in pods(values).items() if not name.endswith(("-postgres", "-valkey", "-s3"))}

    for pod in ours.values():
        for name, entry in variables(pod).items():
            assert name in known | {"HF_TOKEN", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"}
            if re.search("SECRET|_KEY|PASSWORD|TOKEN|HEADERS", name):
                assert set(entry["valueFrom"]) == {"secretKeyRef"}
    for document in documents(values):
        if document["kind"] == "ConfigMap":
            assert {name for name in document["data"] if name.isupper()} <= known


@pytest.mark.parametrize("values", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_pod_is_closed_bounded_and_without_a_token(values: dict[str, Any]) -> None:
    for name, pod in pods(values).items():
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"]
        # The dispatcher alone asks the API server.
        assert pod.get("automountServiceAccountToken", True) is (name == "tp-tunepool-dispatcher")
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= {
                *(volume["name"] for volume in pod.get("volumes", [])),
                "data",
            }


def test_each_process_starts_a_command_that_there_is() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}

    started = {
        container["args"][1]
        for pod in pods(EVERYTHING).values()
        for container in pod["containers"]
        if container.get("args", [""])[0] == "tunepool-server"
    }

    assert started == {"api", "dispatcher", "janitor", "migrate", "playground", "worker"}
    assert started <= commands


def test_a_worker_gets_its_devices_its_grace_and_the_trainers_shared_memory() -> None:
    made = pods(EVERYTHING)
    gpu, cpu = made["tp-tunepool-worker-h100"], made["tp-tunepool-worker-cpu"]

    assert gpu["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8, "memory": "64Gi"}
    assert gpu["terminationGracePeriodSeconds"] == 300
    assert gpu["nodeSelector"] == {"gpu": "h100"}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in gpu["volumes"]
    assert cpu["containers"][0]["resources"]["limits"] == {"memory": "64Gi"}
    assert variables(cpu)["TUNEPOOL_DEVICES"]["value"] == "cpu"
    assert "TUNEPOOL_DEVICES" not in variables(gpu)


def test_the_job_of_an_attempt_is_one_that_the_dispatcher_takes() -> None:
    data = next(document["data"] for document in documents(EVERYTHING) if "job.json" in document.get("data", {}))
    job = json.loads(data["job.json"])
    job["metadata"] = {"name": "attempt-1"}
    job["spec"]["template"]["spec"]["restartPolicy"] = "Never"  # what the dispatcher adds

    kubernetes_validate.validate(job, "1.37.0", strict=True)

    worker = job["spec"]["template"]["spec"]["containers"][0]
    assert worker["command"] == ["tunepool-server"]
    assert "args" not in worker
    assert "TUNEPOOL_POOL" not in {entry["name"] for entry in worker["env"]}


def test_pods_that_train_go_only_when_none_of_their_kind_works() -> None:
    spec = next(document["spec"] for document in documents(EVERYTHING) if document["kind"] == "ScaledObject")
    scale_down = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]

    # KEDA itself takes pods away only to none; the autoscaler between none and the most would stop any of them.
    assert spec["minReplicaCount"] == 0
    assert "idleReplicaCount" not in spec
    assert scale_down == {"selectPolicy": "Disabled"}


def test_traces_go_from_every_process_to_the_collector_that_is_named_and_workers_may_reach_it() -> None:
    made = documents({**OUTSIDE, "traces": {"endpoint": "http://collector:5318", "port": 5318}})
    (config,) = (
        document for document in made if document["kind"] == "ConfigMap" and "TUNEPOOL_LOG_JSON" in document["data"]
    )
    (policy,) = (document for document in made if document["metadata"]["name"].endswith("-trains"))

    assert config["data"]["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector:5318"
    assert {"ports": [{"port": 5318, "protocol": "TCP"}]} in policy["spec"]["egress"]
    plain = json.dumps(documents(OUTSIDE))
    assert "OTEL_" not in plain
    assert "5318" not in plain


def test_alert_rules_are_those_of_this_version() -> None:
    made = next(document for document in documents(EVERYTHING) if document["kind"] == "PrometheusRule")

    assert made["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())


def test_the_chart_is_of_this_version_and_its_services_are_those_of_compose() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    compose = (ROOT / "docker-compose.yml").read_text()

    assert f'version = "{yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]}"' in project
    for name, pod in pods(BUNDLED).items():
        if name.endswith(BUNDLED_PARTS):
            assert f"image: {pod['containers'][0]['image']}\n" in compose


def test_migrations_come_before_the_pods_unless_the_database_comes_with_them() -> None:
    outside = next(document for document in documents(OUTSIDE) if document["metadata"]["name"].endswith("migrate"))

    assert outside["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert "initContainers" not in pods(OUTSIDE)["tp-tunepool-api"]
    assert pods(BUNDLED)["tp-tunepool-api"]["initContainers"][0]["args"] == ["tunepool-server", "migrate"]
    assert not any(name.endswith("migrate") for name in pods(BUNDLED))
