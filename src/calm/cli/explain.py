"""`calm explain`: the stored decision of one request, term by term, and how its predictions turned out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

from calm.cli.client import Client, client_options, connect, segment
from calm.cli.options import json_option
from calm.cli.output import (
    UNKNOWN,
    emit_json,
    heading,
    joules,
    number,
    print_table,
    printable,
    seconds,
)
from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.cli.documents import (
        BeliefView,
        DecisionView,
        EstimateView,
        OutcomeView,
        RequestView,
        TermView,
    )

Formatter = Callable[[float | None], str]

PREFIXES = ("chatcmpl-", "cmpl-", "embd-")
UNITS: Mapping[str, Formatter] = {
    "latency": seconds,
    "others": seconds,
    "energy": joules,
    "cost": lambda usd: f"${number(usd)}",
}
"""How the value of a term is written; every other is a plain number."""


LATEST = "last"
"""Stands for the newest request's id."""


@click.command(short_help="Explain why a model answered a request.")
@click.argument("request_id", required=False)
@json_option
@client_options
def explain(request_id: str | None, as_json: bool, url: str, key_env: str) -> None:
    """Show why a request was served by the model it was served by: every candidate's score term by term, the
    models that were refused and the reason, and what was predicted beside what was observed. The id stands in
    the header x-calm-request-id and in an answer's `id`; without one, or with `last`, it is the latest request.

    \b
    Example:
      calm explain
      calm explain chatcmpl-0193a5c7f2b80d1e6a3f9c52b14
    """
    import msgspec

    from calm.cli.documents import RequestView

    client = connect(url, key_env)
    raw = find(client, request_id)
    if as_json:
        emit_json(msgspec.Raw(raw))
        return
    try:
        show(msgspec.json.decode(raw, type=RequestView), bases(client))
    except msgspec.ValidationError as error:
        raise CalmError(f"this server stores decisions in another form ({error}); try --json") from error


def bases(client: Client) -> Mapping[str, str]:
    """The base of every adapter, for a reader who does not know the fleet; empty where the server will not say."""
    from calm.cli.documents import FleetView

    try:
        models = client.get("/calm/v1/fleet", FleetView).models
    except CalmError:
        return {}
    return {model.name: model.adapter_of for model in models if model.adapter_of}


def find(client: Client, request_id: str | None) -> bytes:
    """The stored request as JSON. Raises ServerSaid, CalmError when there is none yet."""
    if request_id is not None and request_id != LATEST:
        return client.call("GET", f"/calm/v1/decisions/{segment(bare(request_id))}")
    return latest(client)


def bare(request_id: str) -> str:
    """`chatcmpl-ID` -> `ID`."""
    for prefix in PREFIXES:
        request_id = request_id.removeprefix(prefix)
    return request_id


def latest_id(client: Client) -> str:
    import msgspec

    return str(msgspec.json.decode(latest(client), type=dict[str, object])["request_id"])


def latest(client: Client) -> bytes:
    import msgspec

    from calm.cli.documents import Page

    page = client.get("/calm/v1/decisions?limit=1", Page)
    if not page.decisions:
        raise CalmError('no request is stored yet; ask one first: calm ask "Why is the sky blue?"')
    summary = msgspec.json.decode(page.decisions[0], type=dict[str, object])
    return find(client, str(summary["request_id"])) if "decision" not in summary else bytes(page.decisions[0])


# --- showing --------------------------------------------------------------------------------------


def show(request: RequestView, bases: Mapping[str, str] = {}) -> None:
    """`bases`: of the models that are adapters."""
    decision, outcome = request.decision, request.outcome
    for name, value in facts(request, bases):
        click.echo(f"{click.style(f'{name:<9}', bold=True)}{printable(value)}")
    if decision is not None:
        show_ranked(decision, bases)
        show_refused(decision)
    if decision is not None and outcome is not None:
        show_outcome(decision, outcome)
    show_feedback(request)


def facts(request: RequestView, bases: Mapping[str, str] = {}) -> list[tuple[str, str]]:
    """The head: label and value."""
    from calm.cli.why import why

    decision, outcome = request.decision, request.outcome
    rows = [("request", request.request_id or (decision.request_id if decision else UNKNOWN))]
    if request.query:
        rows.append(("query", shortened(request.query)))
    if outcome is not None:
        rows.append(("model", placed(outcome.model, bases) if outcome.model else "none"))
        rows.append(("status", status(outcome)))
    if decision is not None:
        rows.append(("why", "pinned by the caller" if request.pinned else why(decision, outcome)))
        rows.append(("policy", policy_line(decision)))
        rows.append(("decided", decided(decision)))
    return rows


def placed(model: str, bases: Mapping[str, str]) -> str:
    """`finance (adapter on smollm2-135m)`, for a model with an engine of its own just its name."""
    return f"{model} (adapter on {bases[model]})" if model in bases else model


def shortened(text: str, most: int = 100) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"


def status(outcome: OutcomeView) -> str:
    reason = outcome.error or (f"finish: {outcome.finish_reason}" if outcome.finish_reason else "")
    tries = f"{outcome.attempts} attempts" if outcome.attempts > 1 else ""
    details = "; ".join(filter(None, (reason, tries)))
    return f"{outcome.status} ({details})" if details else outcome.status


def policy_line(decision: DecisionView) -> str:
    weights = decision.weights
    shares = ", ".join(
        f"{name} {getattr(weights, name):g}" for name in ("latency", "energy", "quality", "cost")
    )
    return f"{decision.policy}, {f'goal {decision.goal}' if decision.goal else 'weights given'} ({shares})"


def decided(decision: DecisionView) -> str:
    import datetime

    took = f"in {seconds(decision.decision_s)}"
    if decision.wall_s is None:
        return took
    at = datetime.datetime.fromtimestamp(decision.wall_s).astimezone()
    return f"{at:%Y-%m-%d %H:%M:%S} {took}"


def show_ranked(decision: DecisionView, bases: Mapping[str, str] = {}) -> None:
    heading("Candidates (lower scores are better)")
    rows: list[Sequence[str]] = []
    for place, candidate in enumerate(decision.ranked, start=1):
        lead = (str(place), placed(candidate.model, bases), number(candidate.score))
        for term in candidate.terms:
            rows.append((*lead, *term_cells(term)))
            lead = ("", "", "")
        if not candidate.terms:
            rows.append((*lead, "", "", "", "", ""))
    headers = ("rank", "model", "score", "term", "value", "regret", "weight", "contribution")
    print_table(headers, rows, right=(0, 2, 4, 5, 6, 7))


def term_cells(term: TermView) -> tuple[str, ...]:
    write = UNITS.get(term.name, number)
    value = "unknown" if term.value is None else write(term.value)
    return term.name, value, number(term.regret), number(term.weight), number(term.contribution)


def show_refused(decision: DecisionView) -> None:
    if decision.refused:
        heading("Refused")
        rows = [(refusal.model, refusal.constraint, refusal.reason) for refusal in decision.refused]
        print_table(("model", "constraint", "reason"), rows)


def show_outcome(decision: DecisionView, outcome: OutcomeView) -> None:
    heading("Predicted and observed")
    from calm.cli.documents import EstimateView

    estimate = decision.estimates.get(outcome.model or "", EstimateView())
    print_table(("figure", "predicted", "observed"), comparison(estimate, outcome), right=(1, 2))


def comparison(estimate: EstimateView, outcome: OutcomeView) -> list[tuple[str, str, str]]:
    """One row a figure; a spread is one standard deviation."""
    energy = outcome.energy
    metered = f"{joules(energy.joules)} ({energy.meter}, {energy.kind})" if energy else UNKNOWN
    return [
        ("first token", belief(estimate.ttft_s, seconds), seconds(outcome.ttft_s)),
        ("total", belief(estimate.total_s, seconds), seconds(outcome.total_s)),
        ("queue", belief(estimate.queue_s, seconds), seconds(outcome.queue_s)),
        ("load", belief(estimate.load_s, seconds), seconds(outcome.load_s)),
        ("prompt tokens", tokens(estimate.prompt_tokens), tokens(outcome.prompt_tokens)),
        ("output tokens", belief(estimate.output_tokens, tokens), tokens(outcome.completion_tokens)),
        ("energy", belief(estimate.energy_j, joules), metered),
        ("quality", belief(estimate.quality, number), UNKNOWN),
    ]


def tokens(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}"


def belief(value: BeliefView | None, write: Formatter) -> str:
    """`0.42 s ± 0.05 s`."""
    if value is None or value.mean is None:
        return UNKNOWN
    return write(value.mean) + (f" ± {write(value.sd)}" if value.sd else "")


def show_feedback(request: RequestView) -> None:
    if request.feedback:
        heading("Feedback")
        rows = [(f"{f.rating:g}", f.source or UNKNOWN, f.comment or "") for f in request.feedback]
        print_table(("rating", "source", "comment"), rows, right=(0,))
