"""The door itself: one aiohttp application, one middleware, two tables of routes.

The middleware is the only place where a request is admitted, counted and, when it fails, answered; handlers
raise CalmErrors and know nothing of it. It must run under a runner with `handler_cancellation=True`
(`calm.gateway.server` does): then a client that leaves cancels its handler, and so the work in the engine.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Mapping

from aiohttp import hdrs, web

from calm import __version__
from calm.clock import SystemClock
from calm.errors import CalmError, ShuttingDown
from calm.gateway.admin_api import AdminApi
from calm.gateway.auth import Guard, require_admin
from calm.gateway.faults import fault, from_http, internal
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.openai_api import OpenAiApi
from calm.gateway.routes import (
    IDENTITY_KEY,
    REQUEST_ID_KEY,
    Route,
    json_response,
    new_request_id,
    too_large,
)
from calm.gateway.service import Service
from calm.ports import Clock

log = logging.getLogger("calm.gateway")

Table = Mapping[tuple[str, str], Route]
"""Method and canonical path -> route."""
NextHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]
EXPOSED = "x-calm-request-id, x-calm-model, x-calm-energy-j, x-calm-energy-meter, x-calm-decision-ms"
_PATTERN = re.compile(r":[^}]+}")
NO_ROUTE = "(none)"
"""The metrics label of everything that is no route."""


class Flights:
    """Requests being answered, so that a shutdown can wait for them and then end them."""

    def __init__(self) -> None:
        self.closing = False
        """No new ones are admitted."""
        self.aborted = False
        """The running ones were cancelled by the server and not by their clients."""
        self._tasks: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._tasks)

    def enter(self) -> asyncio.Task[object] | None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            self._empty.clear()
        return task

    def leave(self, task: asyncio.Task[object] | None) -> None:
        if task is not None:
            self._tasks.discard(task)
        if not self._tasks:
            self._empty.set()

    async def drained(self, grace_s: float) -> bool:
        """Wait until nothing is in flight; False when `grace_s` was not enough."""
        try:
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def abort(self) -> None:
        self.aborted = True
        for task in tuple(self._tasks):
            task.cancel()


FLIGHTS = web.AppKey("calm_flights", Flights)
LIMITS = web.AppKey("calm_limits", Limits)


def build_app(
    service: Service, guard: Guard, limits: Limits, metrics: Metrics, clock: Clock | None = None
) -> web.Application:
    """The application, ready for `calm.gateway.server.start`. Call it inside a running event loop."""
    flights = Flights()
    routes = (
        *OpenAiApi(service, limits, clock or SystemClock()).routes(),
        *AdminApi(service, limits, metrics).routes(),
    )
    routes = (*routes, Route("GET", "/", _index(routes), "open"))
    app = web.Application(client_max_size=limits.max_body_bytes)
    app[FLIGHTS], app[LIMITS] = flights, limits
    door = Door({_added(app, route, limits): route for route in routes}, guard, metrics, flights)
    app.middlewares.append(door.middleware)
    app.on_response_prepare.append(door.on_prepare)
    return app


def _added(app: web.Application, route: Route, limits: Limits) -> tuple[str, str]:
    """Method and path as the router knows them."""
    added = app.router.add_route(route.method, route.path, route.handler, expect_handler=_expecter(limits))
    return route.method, added.resource.canonical if added.resource else route.path


class Door:
    """Admission, accounting and failure, around every handler."""

    def __init__(
        self, routes: Mapping[tuple[str, str], Route], guard: Guard, metrics: Metrics, flights: Flights
    ) -> None:
        self._routes = routes
        self._guard = guard
        self._metrics = metrics
        self._flights = flights

    @web.middleware
    async def middleware(self, request: web.Request, handler: NextHandler) -> web.StreamResponse:
        request_id = request[REQUEST_ID_KEY] = new_request_id()
        route = self._route(request)
        flight = self._flights.enter()
        try:
            response = await self._answer(request, handler, route)
        except CalmError as error:
            response = fault(error, request_id)
        except web.HTTPException as error:
            response = fault(from_http(error, request.method, request.path), request_id)
        except ConnectionError:
            raise
        except asyncio.CancelledError:
            if not self._can_still_answer(request):
                raise
            response = fault(closing(), request_id)
        except Exception:
            log.exception("request %s: %s %s failed", request_id, request.method, request.path)
            response = fault(internal(request_id), request_id)
        finally:
            self._flights.leave(flight)
        self._metrics.response(route.path if route else NO_ROUTE, response.status)
        return response

    async def _answer(
        self, request: web.Request, handler: NextHandler, route: Route | None
    ) -> web.StreamResponse:
        if request.method == "OPTIONS" and self._foreign(request):
            return preflight()
        if request.match_info.http_exception is None and (route is None or route.access != "open"):
            self._admit(request, route)
        return await handler(request)

    def _admit(self, request: web.Request, route: Route | None) -> None:
        """What stands in no table is for admins: a mistake here must not open a door."""
        identity = self._guard.admit(request.method, request.headers, request.remote or None)
        if route is None or route.access == "admin":
            require_admin(identity)
        if self._flights.closing:
            raise closing()
        request[IDENTITY_KEY] = identity

    def _can_still_answer(self, request: web.Request) -> bool:
        """True for a handler that the closing server cancelled before it sent a byte."""
        task = asyncio.current_task()
        if not self._flights.aborted or request.writer.output_size or task is None:
            return False
        task.uncancel()
        return True

    def _route(self, request: web.Request) -> Route | None:
        resource = request.match_info.route.resource
        method = "GET" if request.method == "HEAD" else request.method
        return self._routes.get((method, resource.canonical)) if resource else None

    def _foreign(self, request: web.Request) -> bool:
        origin = request.headers.get(hdrs.ORIGIN)
        return origin is not None and self._guard.allows_origin(origin)

    async def on_prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say no versions, and let a configured origin read the answer."""
        response.headers[hdrs.SERVER] = "calm"
        if self._foreign(request):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = request.headers[hdrs.ORIGIN]
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = EXPOSED
            response.headers.add(hdrs.VARY, "Origin")


def closing() -> ShuttingDown:
    return ShuttingDown("the server is closing; try again shortly")


def preflight() -> web.Response:
    """The answer to a browser that asks whether it may call; the origin is added on the way out."""
    headers: Mapping[str, str] = {
        hdrs.ACCESS_CONTROL_ALLOW_METHODS: "GET, POST, PUT",
        hdrs.ACCESS_CONTROL_ALLOW_HEADERS: "*, Authorization",
        hdrs.ACCESS_CONTROL_MAX_AGE: "600",
    }
    return web.Response(status=204, headers=headers)


def _index(routes: tuple[Route, ...]) -> NextHandler:
    """GET /: what there is here."""
    value = {
        "name": "CALM",
        "version": __version__,
        "endpoints": [f"{route.method} {_PATTERN.sub('}', route.path)}" for route in routes],
        "ask": 'POST /v1/chat/completions {"model": "calm", "messages": [{"role": "user", "content": "…"}]}',
    }

    async def index(request: web.Request) -> web.Response:
        return json_response(value)

    return index


def _expecter(limits: Limits) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
    """`Expect: 100-continue` is answered with 413 at once where the declared body is too large."""

    async def expect(request: web.Request) -> web.StreamResponse | None:
        if (request.content_length or 0) > limits.max_body_bytes:
            return fault(too_large(limits), new_request_id())
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.writer is not None:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        return None

    return expect
