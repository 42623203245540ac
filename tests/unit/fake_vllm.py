"""vLLM's side of adapters, as its `OpenAIServingModels` behaves: names, status codes and error bodies.

`python fake_vllm.py PORT` serves it as a process, for engines of kind `command`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web


class FakeVllm:
    """`modules` are the adapters of --lora-modules; `runtime` is VLLM_ALLOW_RUNTIME_LORA_UPDATING."""

    def __init__(
        self,
        base: str = "base",
        *,
        modules: dict[str, str] | None = None,
        runtime: bool = True,
        enable_lora: bool = True,
        flat_errors: bool = False,
    ) -> None:
        self.base, self.enable_lora, self.flat_errors = base, enable_lora, flat_errors
        self.loras = dict(modules or {})
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.hides: set[str] = set()
        """Adapters that are loaded between a client's look at the list and its request to load them."""
        self.app = web.Application()
        routes = self.app.router
        routes.add_get("/health", self._health)
        routes.add_get("/v1/models", self._models)
        routes.add_post("/v1/chat/completions", self._chat)
        if runtime:
            routes.add_post("/v1/load_lora_adapter", self._load)
            routes.add_post("/v1/unload_lora_adapter", self._unload)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        card = {"object": "model", "created": 1, "owned_by": "vllm", "permission": []}
        models = [{**card, "id": self.base, "root": "org/base", "parent": None, "max_model_len": 2048}]
        models += [
            {**card, "id": name, "root": path, "parent": self.base, "max_model_len": None}
            for name, path in self.loras.items()
            if name not in self.hides
        ]
        return web.json_response({"object": "list", "data": models})

    async def _load(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not name or not path:
            return self._error(400, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.loras:
            message = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
                "set 'load_inplace' to True."
            )
            return self._error(400, "InvalidUserInput", message)
        if not self.enable_lora:
            message = "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora to enable LoRA."
            return self._error(500, "InternalServerError", message)
        config = Path(str(path)) / "adapter_config.json"
        if not config.exists():
            message = f"Loading lora {name} failed: No adapter found for {path}"
            return self._error(404, "NotFoundError", message)
        rank = json.loads(config.read_text())["r"]
        if rank > 16:
            message = f"Call to add_lora method failed: LoRA rank {rank} is greater than max_lora_rank 16."
            return self._error(500, "InternalServerError", message)
        self.loras[str(name)] = str(path)
        return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        name = str(body.get("lora_name"))
        if name not in self.loras:
            return self._error(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
        del self.loras[name]
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _chat(self, request: web.Request) -> web.Response:
        body = await self._note(request)
        model = body["model"]
        if model != self.base and model not in self.loras:
            return self._error(404, "NotFoundError", f"The model `{model}` does not exist.", param="model")
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": f"I am {model}"},
        }
        return web.json_response({"object": "chat.completion", "model": model, "choices": [choice]})

    async def _note(self, request: web.Request) -> dict[str, object]:
        body: dict[str, object] = await request.json()
        self.asked.append((request.path, body))
        return body

    def _error(self, status: int, kind: str, message: str, param: str | None = None) -> web.Response:
        error = {"message": message, "type": kind, "param": param, "code": status}
        body = {"object": "error", **error} if self.flat_errors else {"error": error}
        return web.json_response(body, status=status)


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """The base URL of `app` on a free loopback port."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def main(port: int) -> None:
    runner = web.AppRunner(FakeVllm().app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
