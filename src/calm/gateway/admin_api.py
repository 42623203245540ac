"""CALM's own endpoints under /calm/v1, and health: what the fleet does, why, and how to steer it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from calm.errors import BadInput, UnknownModel, UnknownRequest
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.relay import PREFIX
from calm.gateway.routes import IDENTITY_KEY, Handler, Route, json_response, read_body
from calm.gateway.service import Document, Service, Steering
from calm.gateway.shapes import convert
from calm.gateway.wire import read_object
from calm.gateway.wishes import read_weights
from calm.records import ModelCard, ModelState

MAX_PAGE = 1000
HIDDEN = "(set)"
"""Stands for the values of an engine's environment: operators put secrets there."""


class AdminApi:
    """Handlers of /calm/v1, /healthz, /readyz and /metrics."""

    def __init__(self, service: Service, limits: Limits, metrics: Metrics) -> None:
        self._service = service
        self._limits = limits
        self._metrics = metrics

    def routes(self) -> tuple[Route, ...]:
        name = "/calm/v1/models/{name}"
        service = self._service
        return (
            Route("GET", "/healthz", self.health, "open"),
            Route("GET", "/readyz", self.ready, "open"),
            Route("GET", "/metrics", self.metrics),
            Route("GET", "/calm/v1/fleet", self.fleet),
            Route("GET", name, self.model, "admin"),
            Route("POST", f"{name}/load", self._action(service.load), "admin"),
            Route("POST", f"{name}/unload", self._action(service.unload), "admin"),
            Route("POST", f"{name}/pin", self._action(lambda model: service.pin(model, True)), "admin"),
            Route("POST", f"{name}/unpin", self._action(lambda model: service.pin(model, False)), "admin"),
            Route("GET", "/calm/v1/decisions", self.decisions, "admin"),
            Route("GET", "/calm/v1/decisions/{id}", self.decision),
            Route("GET", "/calm/v1/knowledge", self.knowledge, "admin"),
            Route("GET", "/calm/v1/goals", self.goals),
            Route("PUT", "/calm/v1/goals", self.put_goals, "admin"),
            Route("GET", "/calm/v1/policy", self.policy),
            Route("PUT", "/calm/v1/policy", self.put_policy, "admin"),
            Route("GET", "/calm/v1/events", self.events, "admin"),
            Route("GET", "/calm/v1/snapshot", self.snapshot, "admin"),
        )

    # --- health -------------------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.Response:
        """The process answers."""
        return json_response({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        """200 when requests can be served, else 503 with the reason."""
        readiness = self._service.readiness()
        return json_response(readiness, status=200 if readiness.ready else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus text."""
        self._metrics.residency(self._service.snapshot())
        body, content_type = self._metrics.render(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})

    # --- fleet --------------------------------------------------------------------------------------

    async def fleet(self, request: web.Request) -> web.Response:
        snapshot = self._service.snapshot()
        cards = self._service.cards()
        fields = {
            "models": [fleet_entry(card, snapshot.models.get(name)) for name, card in cards.items()],
            "refused": self._service.bad_cards(),
            "budget_bytes": snapshot.budget_bytes,
            "used_bytes": snapshot.used_bytes,
            "queue_length": snapshot.queue_length,
            "in_flight": snapshot.in_flight,
        }
        return json_response(fields)

    async def model(self, request: web.Request) -> web.Response:
        return json_response(self._described(self._card(request)))

    def _action(self, act: Callable[[str], Awaitable[None]]) -> Handler:
        async def run(request: web.Request) -> web.Response:
            card = self._card(request)
            await act(card.name)
            return json_response(fleet_entry(card, self._service.snapshot().models.get(card.name)))

        return run

    def _card(self, request: web.Request) -> ModelCard:
        name = request.match_info["name"]
        card = self._service.cards().get(name)
        if card is None:
            raise UnknownModel(f'no model "{name[:200]}" in the fleet', field="name")
        return card

    def _described(self, card: ModelCard) -> Document:
        state = self._service.snapshot().models.get(card.name)
        adapters = [c.name for c in self._service.cards().values() if c.adapter_of == card.name]
        return {**fleet_entry(card, state), "adapters": adapters, "card": public_card(card)}

    # --- decisions and knowledge ----------------------------------------------------------------------

    async def decisions(self, request: web.Request) -> web.Response:
        limit = query_int(request, "limit", 50, low=1, high=MAX_PAGE)
        model, status = request.query.get("model"), request.query.get("status")
        stored = await self._service.recent(limit, model=model, status=status)
        return json_response({"decisions": stored})

    async def decision(self, request: web.Request) -> web.Response:
        """One stored request. A user key sees its own; another's is as unknown as one that never was."""
        request_id = request.match_info["id"]
        for prefix in PREFIX.values():
            request_id = request_id.removeprefix(prefix)
        stored = await self._service.explain(request_id)
        identity = request[IDENTITY_KEY]
        if stored is None or (identity.role != "admin" and stored.tenant != identity.name):
            raise UnknownRequest(f'no request "{request_id[:128]}" is stored', field="id")
        return json_response(stored)

    async def knowledge(self, request: web.Request) -> web.Response:
        return json_response(await self._service.knowledge())

    async def events(self, request: web.Request) -> web.Response:
        since = query_int(request, "since", 0, low=0, high=2**63 - 1)
        limit = query_int(request, "limit", 100, low=1, high=MAX_PAGE)
        return json_response({"events": await self._service.events(since, limit)})

    async def snapshot(self, request: web.Request) -> web.Response:
        return json_response(self._service.snapshot())

    # --- steering -----------------------------------------------------------------------------------

    async def goals(self, request: web.Request) -> web.Response:
        return json_response({"goals": self._service.goals()})

    async def put_goals(self, request: web.Request) -> web.Response:
        """Add or replace goals: {"goals": {"NAME": {"latency": 1, "quality": 2}}}; a weight left out is 0."""
        body = read_object(await read_body(request, self._limits), self._limits.max_depth)
        goals = body.get("goals")
        if not isinstance(goals, dict) or not goals:
            raise BadInput("goals: must be an object of goal names and weights", field="goals")
        await self._service.set_goals({n: read_weights(w, f"goals.{n[:64]}") for n, w in goals.items()})
        return await self.goals(request)

    async def policy(self, request: web.Request) -> web.Response:
        return json_response(self._service.policy())

    async def put_policy(self, request: web.Request) -> web.Response:
        """Change the policy: any of {"policy", "goal", "weights", "quality_floor"}."""
        body = read_object(await read_body(request, self._limits), self._limits.max_depth)
        if body.get("weights") is not None:
            body["weights"] = read_weights(body["weights"], "weights")
        await self._service.steer(convert(body, Steering))
        return await self.policy(request)


def fleet_entry(card: ModelCard, state: ModelState | None) -> dict[str, object]:
    """A model as any caller may see it. The state of an adapter is its base's, with the base's name in it."""
    return {
        "name": card.name,
        "description": card.description,
        "adapter_of": card.adapter_of,
        "domains": card.domains,
        "capabilities": card.capabilities,
        "placement": card.placement,
        "context": card.context,
        "engine": card.engine.kind,
        "price": card.price,
        "state": state,
    }


def public_card(card: ModelCard) -> dict[str, object]:
    """The whole metadata file less the values of the engine's environment."""
    fields: dict[str, object] = {name: getattr(card, name) for name in card.__struct_fields__}
    engine: dict[str, object] = {n: getattr(card.engine, n) for n in card.engine.__struct_fields__}
    engine["env"] = dict.fromkeys(card.engine.env, HIDDEN)
    return {**fields, "engine": engine}


def query_int(request: web.Request, name: str, default: int, *, low: int, high: int) -> int:
    """An integer of the query string. Raises BadInput outside low..high."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
        raise BadInput(f"{name}: must be an integer from {low} to {high}", field=name)
    return int(text)
