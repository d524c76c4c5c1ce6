"""`tunepool verify`: whether a folder is the adapter that a server signed, file by file, and signed by whom.

Nothing is asked of a server where the folder is here and `--key` names the public key. Envelope: DSSE 1.0
(github.com/secure-systems-lab/dsse/blob/master/protocol.md); statement: in-toto Statement v1 with SLSA Provenance v1.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import httpx2
import typer
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from tunepool import adapters, native
from tunepool.printing import json_line, printable
from tunepool.requests import BadSetting

FILE_NAME: Final = "provenance.dsse.json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://slsa.dev/provenance/v1"
MAX_BYTES: Final = 16 * 1024 * 1024
EXIT_NOT_PROVEN: Final = 1


class NotProven(Exception):
    """The folder is not what was signed, or nobody known has signed it. `code` names the reason for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class VerifiedStatement:
    """A statement that holds: the key that signed it, and the statement."""

    key_id: str
    statement: dict[str, Any]


def verify(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(metavar="DIR|NAME", help="A folder, or a model that is downloaded first.")],
    key: Annotated[
        str | None,
        typer.Option(metavar="FILE|URL", help="The public key: PEM, or what /v1/tunepool/signing-keys answers."),
    ] = None,
) -> None:
    """Verify an adapter's files and who signed them. Exit 0 when all holds, 1 when not. Offline with DIR and --key."""
    known = keys_of(key) if key is not None else keys_of_the_server(context)
    try:
        if Path(adapter).is_dir():
            proof = prove(Path(adapter), known)
        else:
            with tempfile.TemporaryDirectory() as folder:
                adapters.download(context.obj.client, adapter, out=Path(folder))
                proof = prove(Path(folder), known)
    except NotProven as error:
        if context.obj.as_json:
            print(json_line({"verified": False, "code": error.code, "message": str(error)}))
        else:
            print(printable(f"NOT VERIFIED: {error}"))
        raise typer.Exit(EXIT_NOT_PROVEN) from None
    if context.obj.as_json:
        print(json_line({"verified": True, "key": proof.key_id, "statement": proof.statement}))
    else:
        print(printable("\n".join(lines(proof))))


def prove(folder: Path, known: dict[str, Ed25519PublicKey]) -> VerifiedStatement:
    """The signed statement on a folder that is exactly what it says. Raises NotProven."""
    payload, key_id = opened(folder / FILE_NAME, known)
    stated = _statement(payload)
    compare(folder, _sums(stated))
    return VerifiedStatement(key_id, stated)


def stated_in(file: Path, known: dict[str, Ed25519PublicKey]) -> dict[str, Any]:
    """The statement of an envelope that a known key has signed; of no file is it asked whether it is there.

    Raises NotProven.
    """
    return _statement(opened(file, known)[0])


def opened(file: Path, known: dict[str, Ed25519PublicKey]) -> tuple[bytes, str]:
    """What the envelope holds, and which known key signed it. Raises NotProven."""
    try:
        with file.open("rb") as stream:
            envelope = json.loads(stream.read(MAX_BYTES + 1))
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind, signatures = str(envelope["payloadType"]), list(envelope["signatures"])
        signed = [(str(entry.get("keyid")), base64.b64decode(entry["sig"], validate=True)) for entry in signatures]
    except FileNotFoundError:
        raise NotProven("unsigned", f"There is no {FILE_NAME} in {file.parent}: nobody signed this adapter.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise NotProven("bad_envelope", f"{FILE_NAME} is no DSSE envelope.") from None
    if kind != PAYLOAD_TYPE:
        raise NotProven("other_type", f"{FILE_NAME} holds a '{kind[:100]}', not an in-toto statement.")
    message = b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(payload), payload)
    for key_id, signature in signed:
        if key_id in known:
            try:
                known[key_id].verify(signature, message)
            except InvalidSignature:
                raise NotProven(
                    "bad_signature", f"The signature of {key_id[:16]}… does not hold: the statement was altered."
                ) from None
            return payload, key_id
    by = ", ".join(key_id[:16] for key_id, _ in signed) or "nobody"
    raise NotProven("other_key", f"It is signed by {by}, which is none of the {len(known)} keys that are trusted here.")


def _statement(payload: bytes) -> dict[str, Any]:
    try:
        stated = json.loads(payload)
        kinds = stated["_type"], stated["predicateType"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise NotProven("other_type", "What is signed is no in-toto statement.") from None
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise NotProven(
            "other_type", f"What is signed is a '{kinds[0]!s:.100}' with '{kinds[1]!s:.100}', no provenance of a model."
        )
    return dict(stated)


def _sums(stated: dict[str, Any]) -> dict[str, str]:
    try:
        sums = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in stated["subject"]}
    except (KeyError, TypeError):
        raise NotProven("other_type", "The statement names no files with their sha256.") from None
    if not sums:
        raise NotProven("other_type", "The statement is about no file.")
    return sums


def compare(folder: Path, sums: dict[str, str]) -> None:
    """Raises NotProven unless the folder has these files, each with its sha256, and no other."""
    here = dict(_files(folder))
    if missing := sorted(sums.keys() - here.keys()):
        raise NotProven("missing_file", f"{missing[0]} is signed and not there{_and_more(missing)}.")
    if extra := sorted(here.keys() - sums.keys() - {FILE_NAME}):
        raise NotProven("extra_file", f"{extra[0]} is there and was not signed{_and_more(extra)}.")
    for name, sha256 in sums.items():
        with here[name].open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != sha256:
            raise NotProven("altered_file", f"{name} was altered: its sha256 is {actual}, signed was {sha256}.")


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder by its relative name. A link may point anywhere, and anything else is no file."""
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            yield path.relative_to(folder).as_posix(), path
        elif not stat.S_ISDIR(mode):
            name = path.relative_to(folder).as_posix()
            raise NotProven("extra_file", f"{name} is a link or a special file, and no file that was signed.")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# --- keys -----------------------------------------------------------------------------------------------------------


def keys_of(source: str) -> dict[str, Ed25519PublicKey]:
    """The public keys of a PEM file, of a saved answer of the route, or of an address. Raises BadSetting."""
    if source.startswith(("http://", "https://")):
        try:
            answer = httpx2.get(source, timeout=30, follow_redirects=True)
            answer.raise_for_status()
        except httpx2.HTTPError as error:
            raise BadSetting(f"--key {source}: {error}") from None
        return parsed_keys(answer.content, source)
    try:
        return parsed_keys(Path(source).read_bytes(), source)
    except OSError as error:
        raise BadSetting(f"--key {source}: {error.strerror}") from None


def keys_of_the_server(context: typer.Context) -> dict[str, Ed25519PublicKey]:
    """Those of the server that the command speaks to."""
    return _of_document(native.get(context, "signing-keys"), "the server's signing keys")


def parsed_keys(text: bytes, source: str) -> dict[str, Ed25519PublicKey]:
    """From PEM, or from JSON as the route answers it. Raises BadSetting."""
    if text.lstrip().startswith(b"{"):
        try:
            return _of_document(json.loads(text), source)
        except ValueError:
            raise BadSetting(f"{source} is neither PEM nor JSON.") from None
    return dict([_key(text, source)])


def _of_document(answer: dict[str, Any], source: str) -> dict[str, Ed25519PublicKey]:
    try:
        keys = dict(_key(str(entry["public_key"]).encode(), source) for entry in answer["data"])
    except (KeyError, TypeError):
        raise BadSetting(f"{source} is no list of signing keys.") from None
    if not keys:
        raise BadSetting("The server has no signing key and has signed nothing: tunepool-server signing-keys rotate")
    return keys


def _key(pem: bytes, source: str) -> tuple[str, Ed25519PublicKey]:
    """The key with its id, which is computed from the key and never taken from the document."""
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        raise BadSetting(f"{source} holds no public key in PEM.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise BadSetting(f"{source} holds a public key that is not ed25519.")
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest(), key


# --- words ----------------------------------------------------------------------------------------------------------


def lines(proof: VerifiedStatement) -> Iterator[str]:
    """The statement for people. A field that a server of another version lacks is left out."""
    yield f"Verified: {len(proof.statement['subject'])} files, signed by {proof.key_id}"
    predicate = proof.statement.get("predicate") or {}
    details = predicate.get("runDetails") or {}
    for name in ("invocationId", "startedOn", "finishedOn"):
        if (details.get("metadata") or {}).get(name):
            yield f"  {name:12} {details['metadata'][name]}"
    for source in (predicate.get("buildDefinition") or {}).get("resolvedDependencies") or ():
        digest = " ".join(f"{algorithm}:{value}" for algorithm, value in (source.get("digest") or {}).items())
        rows = (source.get("annotations") or {}).get("rows")
        yield f"  {source.get('name', '')!s:24} {source.get('uri', '')}  {digest}{f'  {rows} rows' if rows else ''}"
