"""Commands of exports: a tuned model as files for llama.cpp and Ollama."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal
from urllib.parse import quote

import typer
from rich.console import Console

from tunepool import adapters, requests, watching
from tunepool.printing import json_line, printable

if TYPE_CHECKING:
    from openai import OpenAI

Format = Literal["gguf", "gguf-lora"]
Onto = Literal["base", "dequantized"]
EXIT_NOT_MADE: Final = 1

exports_cli = typer.Typer(no_args_is_help=True, help="Tuned models as files for llama.cpp and Ollama.")
messages = Console(stderr=True)


def export(  # noqa: PLR0917 -- typer makes options of them
    context: typer.Context,
    name: str,
    as_format: Annotated[
        Format, typer.Option("--format", help="gguf: the merged model. gguf-lora: the adapter alone.")
    ] = "gguf",
    quantization: Annotated[
        str | None, typer.Option(help="f32, f16, bf16, q8_0, q5_0, q4_0 or q4_k_m. Left out: q8_0, of gguf-lora f16.")
    ] = None,
    onto: Annotated[
        Onto | None, typer.Option(help="Weights to merge into; after qlora and qdora it must be said.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Wait, and fetch: the GGUF file if this ends in .gguf, else all files into this folder."),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait for the end; exit 1 unless it succeeds.")] = False,
) -> None:
    """Export a tuned model as GGUF and print the export's id, or the paths of what was fetched."""
    client = context.obj.client
    options = requests.given(quantization=quantization, onto=onto)
    record = create(client, name, as_format=as_format.replace("-", "_"), **options)
    if wait or output is not None:
        record = ended(client, record["id"])
    if output is None or record["status"] == "failed":
        print(json_line(record) if context.obj.as_json else record["id"])
    if record["status"] == "failed":
        messages.print(printable(record["error"]["message"]), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_NOT_MADE)
    if output is not None:
        _print_paths(context, fetched(record, output))


def push(
    context: typer.Context,
    name: str,
    repo: Annotated[str, typer.Option(help="organization/name on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option(help="Of a repository that is made.")] = True,
    wait: Annotated[bool, typer.Option(help="Wait, print the address; exit 1 unless it succeeds.")] = False,
) -> None:
    """Bring a model, merge_… or export_… to the hub with the project's HF_TOKEN, and print the push's id."""
    body = {"model": name, "repository": repo, "private": private}
    record = _record(context.obj.client.post("/tunepool/pushes", cast_to=object, body=body))
    if wait:
        record = ended(context.obj.client, record["id"])
    print(json_line(record) if context.obj.as_json else record["url"] or record["id"])
    if record["status"] == "failed":
        messages.print(printable(record["error"]["message"]), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(EXIT_NOT_MADE)


@exports_cli.command("list")
def list_exports(context: typer.Context) -> None:
    """Print the project's exports, newest first."""
    for record in page(context.obj.client):
        print(json_line(record) if context.obj.as_json else printable(line(record)))


@exports_cli.command("show")
def show_export(context: typer.Context, export_id: str) -> None:
    """Print how an export stands, and its files."""
    record = find(context.obj.client, export_id)
    print(json_line(record) if context.obj.as_json else printable("\n".join(lines(record))))


@exports_cli.command("download")
def download_export(context: typer.Context, export_id: str, out: Path) -> None:
    """Fetch an export's files: the GGUF file if OUT ends in .gguf, else all into the folder OUT. Each is verified."""
    _print_paths(context, fetched(find(context.obj.client, export_id), out))


@exports_cli.command("cancel")
def cancel_export(context: typer.Context, export_id: str) -> None:
    """End an export that is being made, or withdraw its files."""
    answer = context.obj.client.delete(_path(export_id), cast_to=object)
    print(json.dumps(answer) if context.obj.as_json else export_id)


def _print_paths(context: typer.Context, paths: list[Path]) -> None:
    for path in paths:
        print(json.dumps({"path": str(path)}) if context.obj.as_json else path)


# --- over the wire ---------------------------------------------------------------------------------------------------


def create(client: OpenAI, name: str, *, as_format: str, **options: Any) -> dict[str, Any]:
    """Have a tuned model exported. Raises openai.APIStatusError when the server refuses."""
    body = {"adapter": name, "format": as_format, **options}
    return _record(client.post("/tunepool/exports", cast_to=object, body=body))


def find(client: OpenAI, export_id: str) -> dict[str, Any]:
    return _record(client.get(_path(export_id), cast_to=object))


def page(client: OpenAI) -> list[dict[str, Any]]:
    answer = _record(client.get("/tunepool/exports?limit=100", cast_to=object))
    return list(answer["data"])


def ended(client: OpenAI, export_id: str, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """The record of an export once it has ended."""
    with watching.interruptible_work(left=f"{export_id} goes on: tunepool exports show {export_id}"):
        while (record := find(client, export_id))["status"] in adapters.UNFINISHED:
            sleep(adapters.POLL_SECONDS)
    return record


def fetched(record: dict[str, Any], out: Path) -> list[Path]:
    """Fetch the files of a finished export; of `x.gguf` the GGUF file alone. Raises as `adapters.download`."""
    if out.suffix != ".gguf":
        return adapters.fetch(record["files"], out=out)
    whole = [{**file, "name": out.name} for file in record["files"] if file["name"].endswith(".gguf")]
    return adapters.fetch(whole, out=out.parent)


def line(record: dict[str, Any]) -> str:
    request = record["request"]
    if "repository" in request:
        return f"{record['id']}  {record['status']:9}  {request['model']} to {request['repository']}"
    return f"{record['id']}  {record['status']:9}  {request['format']} {request['quantization']}  {request['adapter']}"


def lines(record: dict[str, Any]) -> list[str]:
    """An export's record for people."""
    why = record["error"]["message"] if record["error"] else record["detail"]
    files = [f"{file['name']}  {file['bytes']:,} bytes  sha256 {file['sha256']}" for file in record["files"]]
    return [line(record), *([why] if why else []), *files]


def _path(export_id: str) -> str:
    return f"/tunepool/exports/{quote(export_id, safe='')}"


def _record(answer: object) -> dict[str, Any]:
    assert isinstance(answer, dict)
    return answer
