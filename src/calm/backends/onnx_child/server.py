"""HTTP on a unix socket: one thread a connection."""

from __future__ import annotations

import json
import select
import socket
import socketserver
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from .refusal import Json, Left, Refused
from .request import read_request
from .service import Service

MAX_BODY_BYTES = 4 << 20


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, path: str, service: Service) -> None:
        self.service = service
        super().__init__(path, Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Requests are CALM's to log."""

    def do_GET(self) -> None:
        if self.path != "/health":
            missing = Refused(f"no {self.path} here", status=HTTPStatus.NOT_FOUND)
            return self._reply(missing.status, missing.body())
        return self._reply(HTTPStatus.OK, {"status": "ok", "busy": self.server.service.busy})

    def do_POST(self) -> None:
        try:
            self._answer()
        except Refused as refused:
            self._reply(refused.status, refused.body())
        except (Left, OSError):
            self.close_connection = True

    def _answer(self) -> None:
        body = self._body()
        if self.path != "/v1/chat/completions":
            raise Refused(f"this model does not serve {self.path}", status=HTTPStatus.NOT_FOUND)
        asked = read_request(body)
        answer = self.server.service.answer(asked, self._alive)
        if asked.stream:
            self._stream(answer.events(asked.usage_in_stream))
        else:
            self._reply(HTTPStatus.OK, answer.whole())

    def _body(self) -> object:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # what was not read cannot be skipped
            wanted = f"a body of at most {MAX_BODY_BYTES} bytes is wanted"
            raise Refused(wanted, status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused("the body is not valid JSON") from None

    def _alive(self) -> bool:
        """False once the client closed its end."""
        readable = select.select([self.connection], [], [], 0)[0]
        if not readable:
            return True
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _reply(self, status: HTTPStatus, body: Json) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterable[Json]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True
