"""Exports as their users meet them: accepted, settled, refused by name, polled, withdrawn."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.orm import Session

from shared.chores import exports
from shared.chores.merges import MergeClaim
from shared.contract.merge_request import CreateExport
from shared.contract.spec import JobSpec
from shared.errors import LimitReached
from shared.ids import new_id
from shared.products import garbage
from shared.store.db import session_scope
from shared.store.tables import JobRow
from tests.factories import make_caller
from tests.integration.conftest import Api
from tests.integration.test_merges import MANIFEST, adapter, make_adapter, post, refusal


def test_an_export_is_accepted_settled_polled_listed_and_withdrawn(api: Api, stranger: str) -> None:
    name = adapter(api, method="lora")

    made = post(api, "exports", {"adapter": name, "format": "gguf"}).json()

    assert (made["object"], made["status"], made["files"]) == ("tunepool.export", "queued", [])
    assert made["request"] == {"adapter": name, "format": "gguf", "quantization": "q8_0", "onto": None}
    with api.http() as http:
        assert http.get(f"/v1/tunepool/exports/{made['id']}").json() == made
        assert made in http.get("/v1/tunepool/exports").json()["data"]
        with api.http(stranger) as other:
            assert other.get(f"/v1/tunepool/exports/{made['id']}").status_code == 404
            assert other.delete(f"/v1/tunepool/exports/{made['id']}").status_code == 404
        assert http.delete(f"/v1/tunepool/exports/{made['id']}").json()["deleted"] is True
        assert http.get(f"/v1/tunepool/exports/{made['id']}").status_code == 404


def test_an_adapter_alone_is_kept_in_sixteen_bits_unless_asked_otherwise(api: Api) -> None:
    made = post(api, "exports", {"adapter": adapter(api, method="lora", use_rslora=True), "format": "gguf_lora"}).json()

    assert made["request"]["quantization"] == "f16"


@pytest.mark.parametrize(
    ("trained", "request_", "expected"),
    [
        ({"method": "qlora"}, {}, ("missing_required_parameter", "onto")),
        ({"method": "lora"}, {"onto": "dequantized"}, ("unsupported_combination", "onto")),
        ({"method": "full"}, {"onto": "base"}, ("invalid_value", "onto")),
        ({"method": "full"}, {"format": "gguf_lora"}, ("not_an_adapter", "format")),
        ({"method": "dora"}, {"format": "gguf_lora"}, ("adapter_not_exported", "format")),
        (
            {"method": "lora", "modules_to_save": ["lm_head"]},
            {"format": "gguf_lora"},
            ("adapter_not_exported", "format"),
        ),
        ({"method": "lora"}, {"format": "gguf_lora", "quantization": "q8_0"}, ("invalid_value", "quantization")),
        ({"method": "lora"}, {"format": "gguf_lora", "onto": "base"}, ("invalid_value", "onto")),
        ({"method": "lora"}, {"quantization": "q3_k_s"}, ("invalid_value", "quantization")),
        ({"method": "lora"}, {"format": "onnx"}, ("invalid_value", "format")),
    ],
)
def test_an_export_that_would_be_wrong_is_refused_at_once(
    api: Api, trained: dict[str, Any], request_: dict[str, Any], expected: tuple[str, str]
) -> None:
    body = {"adapter": adapter(api, **trained), "format": "gguf", **request_}

    assert refusal(post(api, "exports", body)) == expected


def test_an_architecture_that_the_export_does_not_know_is_refused_by_name(api: Api) -> None:
    name = adapter(api, method="lora")
    with session_scope(api.engine) as session:
        job = session.get_one(JobRow, f"ftjob-{name.rsplit(':', 1)[1]}")
        spec = JobSpec.model_validate(job.spec)
        facts = spec.base_model.facts.model_copy(update={"architecture": "MambaForCausalLM"})
        base = spec.base_model.model_copy(update={"facts": facts})
        job.spec = spec.model_copy(update={"base_model": base}).model_dump(mode="json")

    answer = post(api, "exports", {"adapter": name, "format": "gguf"})

    assert refusal(answer) == ("architecture_not_exported", "adapter")
    assert "MambaForCausalLM" in answer.json()["error"]["message"]


def test_a_finished_export_has_a_link_for_each_file(api: Api) -> None:
    made = post(api, "exports", {"adapter": adapter(api, method="lora"), "format": "gguf"}).json()
    with session_scope(api.engine) as session:
        while (claimed := claim(session)) is not None:
            exports.RECORDS.finish(session, claimed.lease, manifest=MANIFEST)

    with api.http() as http:
        record = http.get(f"/v1/tunepool/exports/{made['id']}").json()
    assert (record["status"], [file["name"] for file in record["files"]]) == (
        "succeeded",
        ["adapter_model.safetensors"],
    )
    assert record["files"][0]["url"].startswith("http")


def claim(session: Session) -> MergeClaim | None:
    return exports.claim(session, worker_id=new_id("worker_"), lease_seconds=60)


def test_a_project_has_a_bounded_number_of_unfinished_exports(session: Session) -> None:
    caller = make_caller(session)
    request = CreateExport(adapter=make_adapter(session, caller, method="lora"), format="gguf")
    for _ in range(exports.MAX_UNFINISHED):
        exports.submit(session, request, project_id=caller.project_id)

    with pytest.raises(LimitReached) as refused:
        exports.submit(session, request, project_id=caller.project_id)

    assert refused.value.code == "too_many_exports"


def test_a_withdrawn_export_leaves_nothing_behind_and_a_finished_one_keeps_its_files(session: Session) -> None:
    caller = make_caller(session)
    request = CreateExport(adapter=make_adapter(session, caller, method="lora"), format="gguf")
    rows = [exports.submit(session, request, project_id=caller.project_id) for _ in range(2)]
    for row in rows:
        row.status, row.manifest = "succeeded", MANIFEST
        row.finished_at = row.created_at - timedelta(hours=30)
    rows[1].deleted_at = row.created_at - timedelta(hours=2)
    session.flush()

    dead = dict(garbage.dead_export_prefixes(session))

    kept = [dead[f"{caller.project_id}/exports/{row.id}"] for row in rows]
    assert kept == [frozenset({"somewhere/"}), frozenset()]
