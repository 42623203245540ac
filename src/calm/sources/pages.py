"""Index pages: small, fetched whole, with the same patience as a download."""

from __future__ import annotations

import gzip
from collections.abc import Mapping

import aiohttp
import msgspec

from calm.errors import SourceError
from calm.records import Record
from calm.sources.context import FetchOptions
from calm.sources.download import backoff_s, public, refuse_downgrade, retry_after_s, status_hint

_MAX_PAGE_BYTES = 64 << 20
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class Page(Record, frozen=True, kw_only=True):
    """`url` is where the page was found after redirects: its relative links start there."""

    url: str
    content_type: str
    body: bytes


async def get_page(
    session: aiohttp.ClientSession,
    url: str,
    *,
    accept: str,
    name: str,
    options: FetchOptions,
    headers: Mapping[str, str] | None = None,
    trusted_hosts: frozenset[str] = frozenset(),
) -> Page | None:
    """The page, None where the server has none (404). Raises SourceError on refusal or when it stays away."""
    if not options.may_use(url, trusted_hosts):
        raise SourceError(f"{name}: {public(url)} is plain http. Use https, or allow http sources.")
    reason = ""
    for attempt in range(1, options.attempts + 1):
        wait_s: float | None = None
        try:
            async with session.get(url, headers={"Accept": accept, **(headers or {})}) as response:
                refuse_downgrade(response, options, trusted_hosts, name)
                if response.status == 404:
                    return None
                if response.status == 200:
                    return await _read(response, name)
                if response.status not in _TRANSIENT:
                    hint = status_hint(response.status)
                    raise SourceError(f"{name}: {public(url)} answered {response.status}. {hint}")
                reason, wait_s = f"HTTP {response.status}", retry_after_s(response.headers)
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
        if attempt < options.attempts:
            await options.sleep(backoff_s(attempt, wait_s))
    raise SourceError(f"{name}: {public(url)} does not answer: {reason}. Check the network or the proxy.")


async def _read(response: aiohttp.ClientResponse, name: str) -> Page:
    body = await response.content.read(_MAX_PAGE_BYTES)
    while more := await response.content.read(_MAX_PAGE_BYTES):
        body += more
        if len(body) > _MAX_PAGE_BYTES:
            raise SourceError(f"{name}: {public(str(response.url))} is no index page: it does not end")
    if response.headers.get("Content-Encoding") == "gzip":  # sent by some although identity was asked for
        body = gzip.decompress(body)
    return Page(url=str(response.url), content_type=response.content_type, body=body)


def decode_json(page: Page, name: str) -> Mapping[str, object]:
    """The page as a JSON object. Raises SourceError when it is something else."""
    try:
        return msgspec.json.decode(page.body, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise SourceError(f"{name}: {public(page.url)} is not the JSON it should be: {error}") from error
