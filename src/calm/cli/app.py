"""The tree of commands."""

from __future__ import annotations

import click

from calm.cli.ask import ask
from calm.cli.bench import bench
from calm.cli.config import config
from calm.cli.doctor import doctor
from calm.cli.explain import explain
from calm.cli.feedback import feedback
from calm.cli.field import field
from calm.cli.group import RootGroup
from calm.cli.keys import keys
from calm.cli.knowledge import knowledge
from calm.cli.models import models
from calm.cli.policy import goal, policy
from calm.cli.profile import profile
from calm.cli.replay import replay
from calm.cli.report import report
from calm.cli.serve import serve
from calm.cli.specialise import specialise
from calm.cli.version import version


@click.group(
    cls=RootGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
def calm() -> None:
    """CALM serves a fleet of small language models behind one OpenAI-compatible endpoint, and for each
    request chooses the model by its predicted quality, latency and energy.

    \b
    Example:
      calm serve                                   start the server
      calm ask "Why is the sky blue?"              ask it, from another terminal
      calm explain                                 why that model answered
    """


models.add_command(field)
for command in (
    serve, ask, explain, feedback, models, doctor, config, keys, knowledge, policy, goal,
    specialise, replay, profile, bench, report, version,
):  # fmt: skip
    calm.add_command(command)
