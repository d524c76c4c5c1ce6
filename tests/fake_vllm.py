"""Behaves as vLLM 0.33's server where Tunepool meets it: names, adapters at run time, its errors. Loads no weights.

Its answer is the last message's words, each with the name of who speaks. It forgets, refuses and fails when told to.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

KEY = "the-server's-own"
UNSERVED = ("use_dora", "modules_to_save", "target_parameters")


@dataclass
class FakeVllm:
    """What it holds and what it was asked; `orders` make it fail."""

    base: str
    path: str = "/models/base"
    longest_rank: int = 16
    adapters: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    orders: set[str] = field(default_factory=set)
    left: threading.Event = field(default_factory=threading.Event)


def refused(message: str, status: int = 400, **more: Any) -> Response:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": status, **more}
    return JSONResponse({"error": error}, status)


def app_of(state: FakeVllm) -> FastAPI:
    app = FastAPI()

    @app.middleware("http")
    async def its_key(request: Request, go_on: Any) -> Response:
        state.headers.append(dict(request.headers))
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        if "down" in state.orders:
            return refused("engine is dead", 500)
        return await go_on(request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        base = {"id": state.base, "object": "model", "root": state.path, "parent": None}
        tuned = [
            {"id": name, "object": "model", "root": at, "parent": state.base} for name, at in state.adapters.items()
        ]
        return {"object": "list", "data": [base, *tuned]}

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Response:
        if request.headers.get("content-type") != "application/json":
            return refused("Unsupported Media Type: Only 'application/json' is allowed", 415)
        wanted = await request.json()
        name, folder = wanted["lora_name"], Path(wanted["lora_path"])
        if name in state.adapters:
            return refused(f"The lora adapter '{name}' has already been loaded. If you want to load it in place …")
        if not (folder / "adapter_config.json").is_file():
            return refused(f"No adapter found for {folder}", 404)
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["r"] > state.longest_rank:
            return refused(f"LoRA rank {config['r']} is greater than max_lora_rank {state.longest_rank}.")
        if any(config.get(trait) for trait in UNSERVED):
            return refused("vLLM does not yet support it.")
        await asyncio.sleep(0.01)
        state.adapters[name] = str(folder)
        state.loads.append(name)
        return Response(f"Success: LoRA adapter '{name}' added successfully.", media_type="text/plain")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await request.json()
        return await answer(asked, asked["messages"][-1]["content"], "chat.completion")

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        asked = await request.json()
        return await answer(asked, asked["prompt"], "text_completion")

    async def answer(asked: dict[str, Any], text: str, kind: str) -> Response:
        state.asked.append(asked)
        if asked["model"] not in {state.base, *state.adapters}:
            return refused(f"The model `{asked['model']}` does not exist.", 404, type="NotFoundError")
        if "full" in text:
            return refused("This model's maximum context length is 8 tokens.", param="input_tokens")
        if "broken" in text:
            return refused("engine is dead", 500)
        words = [f"{asked['model']}:{word}" for word in text.split()]
        head = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": asked["model"]}
        if asked.get("stream"):
            return StreamingResponse(
                chunks(head, words, chat=kind == "chat.completion"), media_type="text/event-stream"
            )
        said: dict[str, Any] = {"text": " ".join(words)}
        if "chat" in kind:
            said = {"message": {"role": "assistant", "content": " ".join(words)}}
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        choices = [{"index": 0, "finish_reason": "stop", "logprobs": None, **said}]
        return JSONResponse({**head, "choices": choices, "usage": usage, "kv_transfer_params": None})

    async def chunks(head: dict[str, Any], words: list[str], *, chat: bool) -> AsyncIterator[str]:
        try:
            for word in words:
                if word.endswith(":cut"):
                    raise RuntimeError("the engine died")
                while word.endswith(":wait"):
                    await asyncio.sleep(0.02)
                said = {"delta": {"content": f"{word} "}} if chat else {"text": f"{word} "}
                chunk = {**head, "object": f"{head['object']}.chunk" if chat else head["object"]}
                yield f"data: {json.dumps({**chunk, 'choices': [{'index': 0, 'finish_reason': None, **said}]})}\n\n"
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            state.left.set()
            raise

    return app
