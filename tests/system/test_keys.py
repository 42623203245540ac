"""API keys of a real server: who may do what, and that no key is ever written down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import openai
import pytest
from tests.system.conftest import CALM, SMOL, Launch, Server, eventually

pytestmark = pytest.mark.models


def create_key(server: Server, name: str, *flags: str) -> str:
    """As an operator does it: `calm keys create`."""
    done = subprocess.run(
        [str(CALM), "keys", "create", name, *flags],
        env={**os.environ, "CALM_STATE_DIR": str(server.state)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = [word for word in done.stdout.split() if word.startswith("calm-")]
    assert len(found) == 1, done.stdout
    return found[0]


class Keyed:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.user = create_key(server, "alice")
        self.other = create_key(server, "bob")
        self.admin = create_key(server, "root", "--admin")


@pytest.fixture(scope="module")
def keyed_server(weights: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    from tests.system.conftest import launcher

    with launcher(lambda name: tmp_path_factory.mktemp(name)) as launch:
        server = launch(SMOL, start=False)
        keyed = Keyed(server)
        server.start()
        yield keyed


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_no_key_is_401(keyed_server: Keyed) -> None:
    server = keyed_server.server
    for headers in ({}, bearer("calm-wrong"), {"x-api-key": "calm-wrong"}, {"Authorization": "Basic x"}):
        refused = server.chat("Hi", SMOL, headers=headers)
        assert refused.status_code == 401
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert "Bearer" in refused.headers["WWW-Authenticate"]
    assert server.request("GET", "/v1/models").status_code == 401
    assert server.request("GET", "/metrics").status_code == 401
    assert server.request("GET", "/healthz").status_code == 200


def test_the_openai_client_raises_its_own_errors(keyed_server: Keyed) -> None:
    with (
        keyed_server.server.openai(api_key="calm-wrong") as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with keyed_server.server.openai(api_key=keyed_server.user) as client:
        answer = client.chat.completions.create(
            model=SMOL, messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
        assert answer.choices[0].message.content


ADMIN = [
    ("GET", "/calm/v1/knowledge"),
    ("GET", "/calm/v1/decisions"),
    ("GET", "/calm/v1/snapshot"),
    ("GET", "/calm/v1/events"),
    ("GET", f"/calm/v1/models/{SMOL}"),
    ("POST", f"/calm/v1/models/{SMOL}/load"),
    ("PUT", "/calm/v1/policy"),
    ("PUT", "/calm/v1/goals"),
]


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_a_user_key_is_403_where_an_admin_is_wanted(keyed_server: Keyed, method: str, path: str) -> None:
    body = {"goal": "balanced", "goals": {"mine": {"latency": 1}}} if method == "PUT" else None
    if path.endswith("policy"):
        body = {"goal": "balanced"}
    elif path.endswith("goals"):
        body = {"goals": {"mine": {"latency": 1}}}
    refused = keyed_server.server.request(method, path, headers=bearer(keyed_server.user), json=body)
    assert refused.status_code == 403
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("permission_error", "forbidden")
    allowed = keyed_server.server.request(method, path, headers=bearer(keyed_server.admin), json=body)
    assert allowed.status_code == 200, allowed.text


def test_the_403_names_a_command_that_works(keyed_server: Keyed) -> None:
    refused = keyed_server.server.request("GET", "/calm/v1/knowledge", headers=bearer(keyed_server.user))
    command = refused.json()["error"]["message"].split("`")[1]
    program, *arguments = command.replace("NAME", "named-by-the-403").split()
    assert program == "calm"
    assert create_key(keyed_server.server, *arguments[2:]).startswith("calm-")


def test_a_user_sees_its_own_decisions_only(keyed_server: Keyed) -> None:
    server = keyed_server.server
    answer = server.chat("Hi", SMOL, headers=bearer(keyed_server.user), max_tokens=2)
    path = f"/calm/v1/decisions/{answer.json()['id']}"
    mine = server.request("GET", path, headers=bearer(keyed_server.user))
    assert mine.status_code == 200
    assert mine.json()["tenant"] == "alice"
    assert server.request("GET", path, headers=bearer(keyed_server.other)).status_code == 404
    assert server.request("GET", path, headers=bearer(keyed_server.admin)).status_code == 200


def test_a_user_rates_its_own_answers_only(keyed_server: Keyed) -> None:
    server = keyed_server.server
    answer = server.chat("Hi", SMOL, headers=bearer(keyed_server.user), max_tokens=2)
    rating = {"request_id": answer.json()["id"], "rating": 1}
    stranger = server.request("POST", "/v1/feedback", json=rating, headers=bearer(keyed_server.other))
    assert stranger.status_code == 404, "a stranger's rating would steer routing for everybody"
    mine = server.request("POST", "/v1/feedback", json=rating, headers=bearer(keyed_server.user))
    assert mine.status_code == 200


def test_keys_come_and_go_while_it_runs(keyed_server: Keyed) -> None:
    server = keyed_server.server
    late = create_key(server, "late")
    eventually(
        "the new key counts",
        lambda: server.request("GET", "/v1/models", headers=bearer(late)).status_code == 200,
    )
    subprocess.run(
        [str(CALM), "keys", "revoke", "late"],
        env={**os.environ, "CALM_STATE_DIR": str(server.state)},
        check=True,
        capture_output=True,
        timeout=60,
    )
    eventually(
        "the revoked key is dead",
        lambda: server.request("GET", "/v1/models", headers=bearer(late)).status_code == 401,
    )


def test_no_key_is_ever_written_down(keyed_server: Keyed) -> None:
    """Neither in the log nor in any file of the server's state, after everything the tests above did."""
    secrets = [keyed_server.user, keyed_server.other, keyed_server.admin, "calm-wrong"]
    server = keyed_server.server
    assert server.chat("Hi", SMOL, headers=bearer(keyed_server.user), max_tokens=2).status_code == 200
    for secret in secrets:
        assert secret not in server.log
        for file in server.state.rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), f"a key stands in {file.name}"
    assert (server.state / "keys.toml").stat().st_mode & 0o077 == 0


def test_another_address_needs_keys(launch: Launch) -> None:
    server = launch(SMOL, flags=("--host", "0.0.0.0"), start=False)
    server.start(until_ready=False)
    assert server.process.wait(60) != 0
    assert "keys" in server.log
    assert "Traceback" not in server.log
