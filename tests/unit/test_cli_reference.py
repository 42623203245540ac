"""The reference page is current, and help stays quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "cli_reference.py"
HEAVY = ("numpy", "msgspec", "aiohttp", "rich", "asyncio", "psutil", "calm.records", "calm.settings")


def test_the_reference_page_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALM_URL", "http://elsewhere:1")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run scripts/cli_reference.py\n{done.stderr}"


def test_the_page_names_every_option_of_serve() -> None:
    section = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8").split("\n## calm serve\n")[1]
    for flag in ("fleet", "config", "host", "port", "policy", "goal", "budget", "log-level", "insecure"):
        assert f"`--{flag}" in section


def test_help_imports_nothing_heavy() -> None:
    """Start-up time without a stopwatch: what is not imported takes no time."""
    code = (
        "import sys\nfrom calm.cli.app import calm\n"
        "try: calm(['--help'], prog_name='calm')\nexcept SystemExit: pass\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []"
