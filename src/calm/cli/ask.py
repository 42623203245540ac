"""`calm ask`: one question, the answer as it is written, and one line about who wrote it and why."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from calm.cli.client import WORK_S, Client, client_options, connect, segment
from calm.cli.output import emit_json, joules, note, printable, seconds
from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.cli.documents import AnswerView, ReceiptView, RequestView

SEPARATOR = " · "


@click.command(short_help="Ask the running server a question.")
@click.argument("prompt", required=False)
@click.option(
    "--model", default="calm", show_default=True, metavar="NAME", help="Pin a model; calm chooses one."
)
@click.option("--goal", metavar="NAME", help="What matters: balanced, latency, energy, quality, or your own.")
@click.option(
    "--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Give up after."
)
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="T", help="0 is the most predictable.")
@click.option("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the server's whole JSON answer.")
@client_options
def ask(prompt: str | None, as_json: bool, no_stream: bool, url: str, key_env: str, **wishes: object) -> None:
    """Ask the running server a question. The answer goes to stdout as it is written; one line on stderr then
    tells which model wrote it and why, how long it took, and the joules with the name of their meter. The
    prompt is read from stdin when it is `-`, or left out in a pipe.

    \b
    Example:
      calm ask "Why is the sky blue?" --goal energy
      git diff | calm ask - --system "Write a commit message." --max-tokens 60
    """
    body = request_body(read_prompt(prompt), wishes)
    client = connect(url, key_env)
    if as_json:
        raw = client.call("POST", "/v1/chat/completions", body, timeout_s=WORK_S)
        emit_json(parse_json(raw))
        return
    receipt, finish = (print_whole if no_stream else print_stream)(client, body)
    if receipt is not None:
        note(SEPARATOR.join(epilogue(receipt, finish, stored(client, receipt.request_id))))


def read_prompt(prompt: str | None) -> str:
    """The argument, or stdin. Raises UsageError when there is neither."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError('nothing to ask; e.g. calm ask "Why is the sky blue?"')
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text or not text.strip():
        raise click.UsageError("the prompt is empty")
    return text


def request_body(prompt: str, wishes: dict[str, object]) -> dict[str, object]:
    """An OpenAI body; what was not given is left out, so that the server's defaults apply."""
    messages = [{"role": "user", "content": prompt}]
    if wishes["system"] is not None:
        messages.insert(0, {"role": "system", "content": str(wishes["system"])})
    calm = {"goal": wishes["goal"], "deadline_s": wishes["deadline"]}
    optional: dict[str, object] = {
        "max_tokens": wishes["max_tokens"],
        "temperature": wishes["temperature"],
        "calm": {name: value for name, value in calm.items() if value is not None} or None,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"model": wishes["model"], "messages": messages, **given}


# --- answers ------------------------------------------------------------------------------------


def print_stream(client: Client, body: dict[str, object]) -> tuple[ReceiptView | None, str | None]:
    """The answer's pieces as they come; the receipt and the finish reason."""
    receipt, finish = None, None
    wrote = False
    with closing(client.stream("/v1/chat/completions", {**body, "stream": True})) as payloads:
        try:
            for chunk in map(parse_answer, payloads):
                receipt = chunk.calm or receipt
                for choice in chunk.choices[:1]:
                    finish = choice.finish_reason or finish
                    wrote |= write(choice.delta.content)
        finally:
            if wrote:
                click.echo()
    return receipt, finish


def print_whole(client: Client, body: dict[str, object]) -> tuple[ReceiptView | None, str | None]:
    answer = parse_answer(client.call("POST", "/v1/chat/completions", body, timeout_s=WORK_S))
    choice = answer.choices[0] if answer.choices else None
    if choice is not None and write(choice.message.content):
        click.echo()
    return answer.calm, choice.finish_reason if choice else None


def write(text: str | None) -> bool:
    """Without a line's end. A terminal gets no control characters; a pipe gets what the model wrote."""
    if not text:
        return False
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
    return True


def parse_answer(raw: bytes) -> AnswerView:
    import msgspec

    from calm.cli.documents import AnswerView

    try:
        return msgspec.json.decode(raw, type=AnswerView)
    except msgspec.MsgspecError as error:
        raise CalmError(f"the server sent something that is no answer: {error}") from error


def parse_json(raw: bytes) -> object:
    import json

    try:
        document: object = json.loads(raw)
    except ValueError as error:
        raise CalmError("the server's answer is not JSON; is there a CALM server at this URL?") from error
    return document


# --- the line after it ----------------------------------------------------------------------------


def stored(client: Client, request_id: str) -> RequestView | None:
    """The decision behind the answer; None when the server keeps it to itself. Never spoils an answer."""
    from calm.cli.documents import RequestView

    try:
        return client.get(f"/calm/v1/decisions/{segment(request_id)}", RequestView, timeout_s=5.0)
    except CalmError:
        return None


def epilogue(receipt: ReceiptView, finish: str | None, request: RequestView | None) -> list[str]:
    """Model, why, latency, joules, request id."""
    from calm.cli.why import why

    parts = [receipt.model or "no model"]
    if request is not None and request.decision is not None:
        pinned = request.pinned is not None
        parts.append("pinned" if pinned else why(request.decision, request.outcome))
    if finish == "length":
        parts.append("cut at the longest answer allowed")
    return [*parts, latency(receipt), energy(receipt), receipt.request_id]


def latency(receipt: ReceiptView) -> str:
    first = f" (first token {seconds(receipt.ttft_s)})" if receipt.ttft_s is not None else ""
    loading = f", {seconds(receipt.load_s)} of it loading" if receipt.load_s else ""
    return f"{seconds(receipt.total_s)}{first}{loading}" if receipt.total_s is not None else "latency unknown"


def energy(receipt: ReceiptView) -> str:
    """Never a figure without its meter."""
    if receipt.energy_j is None:
        return "energy unknown"
    meter = f"{receipt.energy_meter or 'meter unknown'}, {receipt.energy_kind or 'kind unknown'}"
    return f"{joules(receipt.energy_j)} ({meter})"
