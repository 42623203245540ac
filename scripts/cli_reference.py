"""Writes docs/reference/cli.md from the commands themselves; `--check` only says whether it is current."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from calm.cli.app import calm

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"

HEAD = """\
# Command line

Made from the commands by `scripts/cli_reference.py`; do not edit by hand.

Commands that speak to a server find it at `--url`, else at `$CALM_URL`, else at `http://127.0.0.1:8420`, and
take the API key from the environment variable `CALM_API_KEY` (`--key-env` names another).

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | it failed; the line on stderr says why and what to do |
| 2 | wrong usage |
| 130 | interrupted by Ctrl-C |
"""


def page() -> str:
    """The whole page, with a final newline."""
    return HEAD + "".join(section for _, _, section in sections(calm, "calm", None))


def sections(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[tuple[str, click.Command, str]]:
    """(full name, command, text) of a command and of all below it, in the order of their names."""
    context = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent)
    yield name, command, section(command, name, context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from sections(found, f"{name} {child}", context)


def section(command: click.Command, name: str, context: click.Context) -> str:
    """Heading, explanation, usage, options, example."""
    text, _, example = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"\n## {name}\n\n{text.strip()}\n", f"\n    {name} {usage}\n"]
    parts += [options(command, context)]
    if example:
        indented = "\n".join(f"    {line.strip()}" for line in example.strip().splitlines())
        parts.append(f"\nExample:\n\n{indented}\n")
    return "".join(parts)


def options(command: click.Command, context: click.Context) -> str:
    records = [p.get_help_record(context) for p in command.params if isinstance(p, click.Option)]
    rows = [(names, " ".join(text.split())) for names, text in filter(None, records)]
    if not rows:
        return ""
    lines = ["| `{}` | {} |".format(*(cell.replace("|", r"\|") for cell in row)) for row in rows]
    return "\n| option | meaning |\n|---|---|\n" + "\n".join(lines) + "\n"


def main() -> None:
    text = page()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not current; run {Path(__file__).name}")
        return
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
