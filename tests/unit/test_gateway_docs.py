"""The reference page names every route, wish, header and metric there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calm.clock import ManualClock
from calm.gateway.admin_api import AdminApi
from calm.gateway.fake import ScriptedService
from calm.gateway.limits import Limits
from calm.gateway.metrics import Metrics
from calm.gateway.openai_api import OpenAiApi
from calm.gateway.wishes import HEADERS

PAGE = (Path(__file__).parents[2] / "docs/reference/http-api.md").read_text(encoding="utf-8")


def routes() -> list[str]:
    service, limits = ScriptedService(), Limits()
    metrics = Metrics(service.fleet.__contains__)
    table = (
        *OpenAiApi(service, limits, ManualClock()).routes(),
        *AdminApi(service, limits, metrics).routes(),
    )
    return [re.sub(r":[^}]+}", "}", route.path) for route in table]


@pytest.mark.parametrize("path", routes())
def test_every_route_is_documented(path: str) -> None:
    assert path in PAGE or path.rpartition("/")[2] in ("load", "unload", "pin", "unpin")


@pytest.mark.parametrize(("field", "header"), HEADERS.items())
def test_every_wish_is_documented(field: str, header: str) -> None:
    assert f"`{field}`" in PAGE
    assert f"`{header}" in PAGE


def test_every_metric_is_documented() -> None:
    service = ScriptedService()
    metrics = Metrics(service.fleet.__contains__)
    metrics.residency(service.snapshot())
    for family in metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        assert f"`{name}`" in PAGE, name
