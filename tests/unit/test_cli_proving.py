"""`tunepool verify`: what is whole and signed passes offline; every way to tamper is refused by its own name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tunepool import main, proving
from typer.testing import CliRunner

from shared.tenants.signing_keys import SigningKey

KEY = SigningKey.of(Ed25519PrivateKey.generate())
OTHER = SigningKey.of(Ed25519PrivateKey.generate())
CONTENT = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "sub/tokenizer.json": b"[]"}


def statement(**changes: Any) -> dict[str, Any]:
    stated = {
        "_type": proving.STATEMENT_TYPE,
        "subject": [
            {"name": name, "digest": {"sha256": hashlib.sha256(data).hexdigest()}} for name, data in CONTENT.items()
        ],
        "predicateType": proving.PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "resolvedDependencies": [
                    {"name": "training_file", "digest": {"sha256": "ab"}, "annotations": {"rows": 7}}
                ]
            },
            "runDetails": {"metadata": {"invocationId": "ftjob-1/2"}},
        },
    }
    return {**stated, **changes}


def seal(folder: Path, stated: Any, *, key: SigningKey = KEY, payload_type: str = proving.PAYLOAD_TYPE) -> None:
    envelope = key.envelope(json.dumps(stated).encode(), payload_type=payload_type)
    (folder / proving.FILE_NAME).write_text(json.dumps(envelope))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A signed adapter; its key lies beside it."""
    place = tmp_path / "adapter"
    for name, data in CONTENT.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    seal(place, statement())
    (tmp_path / "key.pem").write_text(KEY.public_pem)
    return place


def verify(folder: Path, *words: str, key: str = "key.pem") -> tuple[int, dict[str, Any]]:
    """(exit code, the document). No server is known."""
    environment = {"TUNEPOOL_HOME": "/nowhere", "OPENAI_BASE_URL": "", "OPENAI_API_KEY": ""}
    asked = ["--json", "verify", str(folder), "--key", str(folder.parent / key), *words]
    done = CliRunner().invoke(main.cli, asked, env=environment)
    assert done.stdout, done.exception
    return done.exit_code, json.loads(done.stdout)


def test_a_whole_and_signed_adapter_is_verified_without_a_server(folder: Path) -> None:
    code, told = verify(folder)

    assert (code, told["verified"], told["key"]) == (0, True, KEY.id)
    assert told["statement"]["predicate"]["runDetails"]["metadata"]["invocationId"] == "ftjob-1/2"


def test_people_read_who_signed_and_what_it_was_made_of(folder: Path) -> None:
    done = CliRunner().invoke(main.cli, ["verify", str(folder), "--key", str(folder.parent / "key.pem")])

    assert f"3 files, signed by {KEY.id}" in done.stdout
    assert "training_file" in done.stdout
    assert "sha256:ab  7 rows" in done.stdout


def test_the_saved_answer_of_the_route_is_a_key_file_too_and_its_ids_are_not_believed(folder: Path) -> None:
    keys = [{"id": "x", "public_key": key.public_pem} for key in (OTHER, KEY)]
    (folder.parent / "keys.json").write_text(json.dumps({"object": "list", "data": keys}))

    assert verify(folder, key="keys.json")[0] == 0


def altered(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"Weights")


def missing(folder: Path) -> None:
    (folder / "sub/tokenizer.json").unlink()


def extra(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def linked(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/etc/hostname")


def resigned(folder: Path) -> None:
    seal(folder, statement(), key=OTHER)


def forged(folder: Path) -> None:
    file = folder / proving.FILE_NAME
    envelope = json.loads(file.read_text())
    envelope["payload"] = KEY.envelope(json.dumps(statement(subject=[])).encode(), payload_type="")["payload"]
    file.write_text(json.dumps(envelope))


def other_payload(folder: Path) -> None:
    seal(folder, statement(), payload_type="text/plain")


def other_statement(folder: Path) -> None:
    seal(folder, statement(_type="https://in-toto.io/Statement/v0.1"))


def other_predicate(folder: Path) -> None:
    seal(folder, statement(predicateType="https://spdx.dev/Document"))


def no_subject(folder: Path) -> None:
    seal(folder, statement(subject=[]))


def strange_subject(folder: Path) -> None:
    seal(folder, statement(subject=[{"name": "adapter_config.json", "digest": {"md5": "x"}}]))


def no_object(folder: Path) -> None:
    seal(folder, ["statement"])


def unsigned(folder: Path) -> None:
    (folder / proving.FILE_NAME).unlink()


def no_envelope(folder: Path) -> None:
    (folder / proving.FILE_NAME).write_text('{"payload": "!", "payloadType": 1, "signatures": [3]}')


def no_signature(folder: Path) -> None:
    file = folder / proving.FILE_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), "signatures": []}))


@pytest.mark.parametrize(
    ("tamper", "code", "words"),
    [
        (altered, "altered_file", "adapter_model.safetensors was altered"),
        (missing, "missing_file", "sub/tokenizer.json is signed and not there"),
        (extra, "extra_file", "pytorch_model.bin is there and was not signed"),
        (linked, "extra_file", "adapter_config.json is a link"),
        pytest.param(resigned, "other_key", f"signed by {OTHER.id[:16]}", id="resigned"),  # the key is of this process
        (forged, "bad_signature", "the statement was altered"),
        (other_payload, "other_type", "'text/plain', not an in-toto statement"),
        (other_statement, "other_type", "Statement/v0.1"),
        (other_predicate, "other_type", "spdx"),
        (no_subject, "other_type", "about no file"),
        (strange_subject, "other_type", "no files with their sha256"),
        (no_object, "other_type", "no in-toto statement"),
        (unsigned, "unsigned", "nobody signed this adapter"),
        (no_envelope, "bad_envelope", "no DSSE envelope"),
        (no_signature, "other_key", "signed by nobody"),
    ],
)
def test_every_way_to_tamper_is_refused_by_its_own_name(
    folder: Path, tamper: Callable[[Path], None], code: str, words: str
) -> None:
    tamper(folder)

    exit_code, told = verify(folder)

    assert (exit_code, told["verified"], told["code"]) == (1, False, code)
    assert words in told["message"]


@pytest.mark.parametrize("text", ["", "no key", '{"data": []}', '{"data": [{}]}', "{"])
def test_a_key_that_is_none_is_bad_input_and_no_verdict(folder: Path, text: str) -> None:
    (folder.parent / "bad").write_text(text)

    done = CliRunner().invoke(main.cli, ["verify", str(folder), "--key", str(folder.parent / "bad")])

    assert done.exit_code != 0
    assert isinstance(done.exception, main.requests.BadSetting)
    assert "VERIFIED" not in done.stdout
