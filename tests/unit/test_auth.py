"""Keys at rest and at the door, and the guards of a server without keys."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import BadInput, Forbidden, Unauthorised
from calm.gateway.auth import Guard, Identity, Keys, host_name, is_loopback, presented_key, require_admin

LOCAL = {"Host": "127.0.0.1:8420"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "keys.toml"


def bearer(key: str) -> dict[str, str]:
    return {**LOCAL, "Authorization": f"Bearer {key}"}


# --- the file -----------------------------------------------------------------------------------------


def test_a_key_is_found_again_and_never_stored(path: Path) -> None:
    key = Keys(path).create("ann", "admin")
    assert key.startswith("calm-")
    assert len(key) > 43
    text = path.read_text()
    assert key not in text
    assert key.removeprefix("calm-") not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert Keys(path).find(key) == Identity(name="ann", role="admin")
    assert Keys(path).find(key[:-1]) is None
    assert Keys(path).find("") is None


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_only_its_owner_may_read_the_file(path: Path) -> None:
    Keys(path).create("ann")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in path.parent.iterdir()] == ["keys.toml"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_a_file_others_may_write_is_refused(path: Path) -> None:
    Keys(path).create("ann")
    path.chmod(0o622)
    with pytest.raises(BadInput, match="chmod 600"):
        Keys(path)


@pytest.mark.parametrize("text", ["keys = 3", "[keys.a]\nsha256 = 1", "[[", "[keys.a]\nspeed = 1", "\x00"])
def test_a_broken_file_is_refused_by_name(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(BadInput, match=r"keys\.toml"):
        Keys(path)


def test_names_are_unique_and_plain(path: Path) -> None:
    keys = Keys(path)
    keys.create("ann")
    for name in ("ann", "", "a b", 'a"]', "-a", "x" * 65, "ann\n"):
        with pytest.raises(BadInput) as caught:
            keys.create(name)
        assert caught.value.field == "name"


def test_list_and_revoke(path: Path) -> None:
    keys = Keys(path)
    ann, bob = keys.create("ann"), keys.create("bob", "admin")
    assert {name: entry.role for name, entry in keys.list().items()} == {"ann": "user", "bob": "admin"}
    keys.revoke("ann")
    assert keys.find(ann) is None
    assert keys.find(bob) is not None
    with pytest.raises(BadInput, match="bob"):
        keys.revoke("ann")


def test_a_running_server_follows_the_file(path: Path) -> None:
    now = [0.0]
    serving = Keys(path, now=lambda: now[0])
    assert serving.empty
    key = Keys(path).create("ann")
    now[0] = 0.5
    assert serving.empty
    now[0] = 1.5
    assert serving.find(key) is not None
    Keys(path).revoke("ann")
    now[0] = 3.0
    assert serving.find(key) is None


def test_a_file_that_breaks_leaves_the_keys_as_they_were(path: Path) -> None:
    now = [0.0]
    key = Keys(path).create("ann")
    serving = Keys(path, now=lambda: now[0])
    path.write_text("[[")
    now[0] = 2.0
    assert serving.find(key) is not None
    assert not serving.empty


# --- the door -----------------------------------------------------------------------------------------


def test_without_keys_loopback_is_the_administrator(path: Path) -> None:
    guard = Guard(Keys(path))
    for host in ("127.0.0.1:8420", "localhost", "LOCALHOST:1", "[::1]:8420", "localhost."):
        assert guard.admit("POST", {"Host": host}, "127.0.0.1").role == "admin"
    assert guard.admit("GET", LOCAL, None).role == "admin"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil", "[::2]"])
def test_a_foreign_host_header_is_refused(path: Path, host: str) -> None:
    with pytest.raises(Forbidden, match="rebinding"):
        Guard(Keys(path)).admit("GET", {"Host": host}, "127.0.0.1")


def test_a_configured_host_is_accepted(path: Path) -> None:
    guard = Guard(Keys(path), allowed_hosts=("Calm.Lan",))
    assert guard.admit("GET", {"Host": "calm.lan:80"}, "127.0.0.1").role == "admin"


def test_without_keys_nobody_comes_in_from_outside(path: Path) -> None:
    for guard, peer in ((Guard(Keys(path)), "10.0.0.5"), (Guard(Keys(path), loopback=False), "127.0.0.1")):
        with pytest.raises(Unauthorised, match="calm keys create"):
            guard.admit("GET", LOCAL, peer)
    assert Guard(Keys(path), loopback=False, insecure=True).admit("GET", {"Host": "x"}, "10.0.0.5")


def test_with_keys_every_caller_needs_one(path: Path) -> None:
    keys = Keys(path)
    user, admin = keys.create("ann"), keys.create("root", "admin")
    guard = Guard(keys, loopback=False)
    assert guard.admit("POST", bearer(user), "10.0.0.5") == Identity(name="ann", role="user")
    assert guard.admit("POST", {"Host": "any", "x-api-key": admin}, "10.0.0.5").role == "admin"
    for headers in (LOCAL, bearer("calm-wrong"), {**LOCAL, "Authorization": f"Basic {user}"}):
        with pytest.raises(Unauthorised):
            guard.admit("POST", headers, "127.0.0.1")


def test_revoking_the_last_key_opens_nothing_to_others(path: Path) -> None:
    keys = Keys(path)
    key = keys.create("ann")
    guard = Guard(keys, loopback=False)
    keys.revoke("ann")
    with pytest.raises(Unauthorised):
        guard.admit("GET", bearer(key), "10.0.0.5")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8420"]
)
def test_pages_from_elsewhere_may_not_post(path: Path, origin: str) -> None:
    guard = Guard(Keys(path))
    with pytest.raises(Forbidden, match="cors_origins"):
        guard.admit("POST", {**LOCAL, "Origin": origin}, "127.0.0.1")
    assert guard.admit("GET", {**LOCAL, "Origin": origin}, "127.0.0.1")


def test_own_and_configured_pages_may_post(path: Path) -> None:
    guard = Guard(Keys(path), allowed_origins=("https://app.example/",))
    assert guard.admit("POST", {**LOCAL, "Origin": "http://127.0.0.1:8420"}, "127.0.0.1")
    assert guard.admit("PUT", {**LOCAL, "Origin": "https://APP.example"}, "127.0.0.1")
    assert Guard(Keys(path), allowed_origins=("*",)).allows_origin("https://any.example")


def test_admin_is_a_role() -> None:
    require_admin(Identity(name="root", role="admin"))
    with pytest.raises(Forbidden, match="admin key"):
        require_admin(Identity(name="ann", role="user"))


def test_where_a_key_is_presented() -> None:
    assert presented_key({"Authorization": "bearer  k "}) == "k"
    assert presented_key({"Authorization": "Bearer ", "x-api-key": "k"}) == "k"
    assert presented_key({"Authorization": "k"}) is None
    assert presented_key({}) is None


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        (None, True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("fe80::1%eth0", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_what_is_loopback(address: str | None, local: bool) -> None:
    assert is_loopback(address) is local


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_no_header_breaks_the_guard(host: str, origin: str, key: str) -> None:
    guard = Guard(Keys(Path("/nonexistent/keys.toml")))
    with suppress(Forbidden):
        guard.admit("POST", {"Host": host, "Origin": origin, "Authorization": key}, "127.0.0.1")
    assert host_name(host) == host_name(host).lower() or not host.isascii()


def test_keys_are_not_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    key = Keys(path).create("ann")
    guard = Guard(Keys(path))
    with pytest.raises(Unauthorised) as caught:
        guard.admit("POST", bearer(key + "x"), "127.0.0.1")
    assert key not in caplog.text + caught.value.message
