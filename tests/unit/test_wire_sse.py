"""The SSE parser: any cut of the bytes, any of the allowed line ends, the same payloads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import EngineLost
from calm.execute.sse import SseParser


def parse(text: bytes, cuts: list[int] | None = None) -> list[bytes]:
    parser, start, payloads = SseParser(), 0, []
    for cut in [*sorted(cuts or []), len(text)]:
        payloads += parser.feed(text[start:cut])
        start = max(start, cut)
    return payloads


@pytest.mark.parametrize(
    ("text", "payloads"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r:", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\ndata\ndata: b\n\n", [b"a\n\nb"]),
        (b": ping\n\ndata: a\n\n: ping\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"database: a\n\n", []),
        (b"\n\n\n", []),
        (b"data:\n\n", []),
        (b"data: [DONE]\n\n", [b"[DONE]"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: unfinished", []),
        (b"data: unfinished\n", []),
    ],
)
def test_what_is_an_event(text: bytes, payloads: list[bytes]) -> None:
    assert parse(text) == payloads
    assert parse(text, list(range(len(text)))) == payloads


PAYLOAD = st.binary(min_size=1, max_size=20).filter(lambda p: b"\n" not in p and b"\r" not in p)


@given(
    payloads=st.lists(PAYLOAD, max_size=6),
    end=st.sampled_from([b"\n", b"\r\n"]),
    comment=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_cuts_change_nothing(payloads: list[bytes], end: bytes, comment: bool, cuts: list[int]) -> None:
    ping = b": ping" + end + end if comment else b""
    text = b"".join(ping + b"data: " + payload + end + end for payload in payloads)
    assert parse(text, [min(cut, len(text)) for cut in cuts]) == payloads


def test_an_event_without_end_is_not_hoarded() -> None:
    parser = SseParser(max_event_bytes=100)
    parser.feed(b"data: " + b"x" * 90)
    with pytest.raises(EngineLost):
        parser.feed(b"x" * 20)
    lines = SseParser(max_event_bytes=100)
    with pytest.raises(EngineLost):
        lines.feed(b"data: xxxxxxxxx\n" * 20)
