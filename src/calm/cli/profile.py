"""`calm profile`: measures every model on the real engine, for `calm replay` to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from calm.cli.options import config_option, fleet_option, json_option, settings_of
from calm.cli.output import count, emit_json, note, warn
from calm.cli.profile_view import Board, board, show
from calm.cli.study_options import DATA_ENV, SPLITS
from calm.errors import BadInput, SourceError

if TYPE_CHECKING:
    from calm.bench.measure import Surveyed
    from calm.bench.measure_answers import AnswerBook, Asking
    from calm.bench.measure_plan import Effort
    from calm.profile import MachineProfile, Profile
    from calm.records import ModelCard
    from calm.settings import Settings
    from calm.workloads.records import Query

Cards = Mapping[str, "ModelCard"]
Keep = Callable[["Profile"], None]


@click.command(short_help="Measure the models on this machine, for calm replay.")
@fleet_option
@config_option
@click.option("--models", metavar="NAME,...", help="Only these models of the fleet.")
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    default="profile.toml",
    show_default=True,
    help="The profile. One of the same machine is continued: models in it are not measured again.",
)
@click.option("--again", is_flag=True, help="Measure also what stands in the profile already.")
@click.option("--quick", is_flag=True, help="A rough one: few prompts, one load, short answers.")
@click.option(
    "--repeats", type=click.IntRange(1), metavar="N", help="Loads and rounds of each model.  [default: 3]"
)
@click.option(
    "--queries", metavar="SET", help="Ask these, for length and quality by domain: domains:gsm8k,pubmedqa,..."
)
@click.option(
    "--data",
    metavar="DIR",
    envvar=DATA_ENV,
    type=click.Path(file_okay=False),
    help=f"Directory of query sets.  [env: {DATA_ENV}]",
)
@click.option(
    "--split", type=click.Choice(SPLITS),
    help="Use only this split of the query sets; held-out: rows that no shipped specialist has learned.",
)  # fmt: skip
@click.option(
    "--sample",
    type=click.IntRange(1),
    metavar="N",
    default=40,
    show_default=True,
    help="Queries per dataset.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer, in tokens."
)
@click.option(
    "--answers",
    metavar="FILE",
    type=click.Path(dir_okay=False),
    help="Keep each answer's length and quality here (JSON lines); one that exists is continued.",
)
@click.option("--keep-answers", is_flag=True, help="Keep the answers' words there too.")
@json_option
def profile(
    fleet: str | None, config_file: str | None, models: str | None, out: str, again: bool, quick: bool,
    repeats: int | None, queries: str | None, data: str | None, split: str | None, sample: int,
    max_tokens: int, answers: str | None, keep_answers: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure what each model of the fleet costs on this machine: load time, memory, reading and writing speed
    alone and with several requests at once, power, and how much engines slow each other down. With --queries
    also how long and how good its answers are. Each model is started by CALM itself, with the threads it would
    have in service; weights must be in the cache. Ctrl-C keeps the models that are done, and the same command
    goes on with the rest.

    \b
    Example:
      calm profile
      calm profile --queries domains:gsm8k,pubmedqa --data ./data --answers answers.jsonl
    """
    if queries is None and (answers or keep_answers):
        raise click.UsageError("--answers and --keep-answers need --queries: what to ask")
    if keep_answers and not answers:
        raise click.UsageError("--keep-answers needs --answers: where to keep them")
    settings, path = settings_of({"fleet": fleet}, config_file), Path(out)
    check_extra()
    whole, cards = chosen(settings, models)
    asking = None
    if queries is not None:
        asking = asking_of(picked(queries, data, split, sample, whole), max_tokens, keep_answers)
    effort = effort_of(quick, repeats, max_tokens)
    surveyed = survey(settings, whole, cards, path, again, effort, asking, answers)
    emit_json(surveyed.profile) if as_json else show(surveyed.profile)
    report(surveyed, path)


# --- what to measure --------------------------------------------------------------------------------


def chosen(settings: Settings, names: str | None) -> tuple[Cards, Cards]:
    """The whole fleet, and the cards to measure: those named, less the ones whose weights are not here.

    Raises BadInput for an unknown name, SourceError when no model is left."""
    from calm.registry import load_fleet
    from calm.settings import fleet_dir

    directory = fleet_dir(settings)
    load = load_fleet(directory)
    for problem in load.problems:
        warn(str(problem))
    wanted = [name.strip() for name in names.split(",")] if names else list(load.fleet)
    if unknown := [name for name in wanted if name not in load.fleet]:
        known = ", ".join(load.fleet) or "none"
        raise BadInput(f"no model {unknown[0]!r} in {directory}; there are: {known}", field="models")
    if not wanted:
        raise BadInput(f"{directory} has no model cards; name another directory with --fleet", field="fleet")
    return load.fleet, able(directory, {name: load.fleet[name] for name in dict.fromkeys(wanted)})


def able(directory: Path, cards: Cards) -> Cards:
    """Those that can be started and asked. The others are named."""
    from calm.cli import weights
    from calm.settings import cache_dir

    absent = {card.name for card in weights.missing(cards.values(), directory, cache_dir())}
    mute = {n for n, card in cards.items() if not {"chat", "completion"} & set(card.capabilities)}
    for name in sorted(absent):
        warn(f"{name}: its weights are not here; `calm models pull {name}` fetches them")
    for name in sorted(mute - absent):
        warn(f"{name}: answers neither chat nor completion, so there is nothing to time")
    left = {name: card for name, card in cards.items() if name not in absent | mute}
    if not left:
        raise SourceError("no model is left to measure; fetch the weights with `calm models pull`")
    return left


def effort_of(quick: bool, repeats: int | None, max_tokens: int) -> Effort:
    from msgspec.structs import replace

    from calm.bench.measure_plan import QUICK, Effort

    effort = QUICK if quick else replace(Effort(), max_tokens=max_tokens)
    if repeats is None:
        return effort
    return replace(
        effort, loads=repeats, prompts_each=repeats, decode_rounds=repeats, contention_rounds=repeats
    )


def picked(queries: str, data: str | None, split: str | None, each: int, fleet: Cards) -> tuple[Query, ...]:
    """The queries to ask. Raises BadInput where the sets are not there or cannot be judged."""
    from calm.bench.measure_answers import sample
    from calm.workloads.records import WorkloadSpec
    from calm.workloads.workload import open_source

    spec = WorkloadSpec(
        arrivals="constant", queries=queries, data=data, split=split, requests=1, rate_rps=1.0
    )
    source = open_source(spec, fleet)
    for remark in source.notes:
        note(remark)
    found = sample([query for query in source.queries if query.answer_type is not None], each)
    if not found:
        raise BadInput(
            f"{queries}: none of these queries says what is right, so no answer could be judged; "
            "give domains:NAME,...",
            field="queries",
        )
    return found


def asking_of(queries: tuple[Query, ...], max_tokens: int, keep_answers: bool) -> Asking:
    from calm.bench.measure_answers import Asking
    from calm.workloads.judge import judge

    return Asking(queries=queries, max_tokens=max_tokens, judge=judge, keep_answers=keep_answers)


# --- measuring --------------------------------------------------------------------------------------


def survey(
    settings: Settings, fleet: Cards, cards: Cards, out: Path, again: bool, effort: Effort,
    asking: Asking | None, answers: str | None,
) -> Surveyed:  # fmt: skip
    """Measure, keeping the profile at `out` up to date. Raises KeyboardInterrupt after saying what is kept."""
    import uvloop

    from calm.bench.measure_answers import AnswerBook
    from calm.profile import write_profile

    check_writable(out)
    book = AnswerBook(Path(answers) if answers else None)
    machine_notes = notes_of(effort, asking)
    kept: list[Profile] = []

    def keep(found: Profile) -> None:
        write_profile(found, out)
        kept.append(found)

    try:
        with board() as bar:
            work = _survey(settings, fleet, cards, out, again, effort, asking, book, machine_notes, keep, bar)
            return uvloop.run(work)
    except KeyboardInterrupt:
        tell_kept(kept[-1] if kept else None, cards, out)
        raise


async def _survey(
    settings: Settings, fleet: Cards, cards: Cards, out: Path, again: bool, effort: Effort,
    asking: Asking | None, book: AnswerBook, notes: tuple[str, ...], keep: Keep, bar: Board,
) -> Surveyed:  # fmt: skip
    from calm.bench.measure import Survey, laboratory, this_machine
    from calm.settings import fleet_dir

    async with laboratory(settings, fleet, fleet_dir(settings), effort, bar) as lab:
        machine = this_machine(lab.cores, lab.meter.name, notes)
        before = profile_before(out, machine, cards, again=again)
        if before is not None:
            machine = replace_contention(machine, before)
        run = Survey(lab, cards, machine, before=before, asking=asking, book=book, keep=keep)
        bar.expect(run.expected_s())
        return await run.run()


def check_extra() -> None:
    """What writes the file is there. Raises BadInput."""
    from importlib.util import find_spec

    if find_spec("tomli_w") is None:
        raise BadInput("calm profile needs more packages: pip install 'calm-orchestrator[bench]'")


def check_writable(out: Path) -> None:
    """Known before anything is measured. Raises OSError, which names the file."""
    existed = out.exists()
    with out.open("ab"):
        pass
    if not existed:
        out.unlink()


def profile_before(out: Path, machine: MachineProfile, cards: Cards, *, again: bool) -> Profile | None:
    """What an earlier run measured and this one keeps. Raises BadInput for a file of another machine."""
    from msgspec.structs import replace

    from calm.profile import read_profile

    if not out.exists():
        return None
    before = read_profile(out)
    same = (before.machine.name, before.machine.cores) == (machine.name, machine.cores)
    if not same and not again:
        raise BadInput(
            f"{out} was measured on another machine ({before.machine.name}, {before.machine.cores} cores to use); "
            "give --out another file, or --again to overwrite it",
            field="out",
        )
    if not same:
        return None
    kept = {name: model for name, model in before.models.items() if not (again and name in cards)}
    return replace(before, models=kept)


def replace_contention(machine: MachineProfile, before: Profile) -> MachineProfile:
    from msgspec.structs import replace

    return replace(machine, contention=before.machine.contention)


def notes_of(effort: Effort, asking: Asking | None) -> tuple[str, ...]:
    """How the figures were come by; and a word to the user where others keep the machine busy."""
    from calm.bench.measure import BUSY, other_load
    from calm.bench.measure_plan import QUICK

    load = other_load()
    if load >= BUSY:
        warn(f"other processes use {load:.0%} of the cores: the figures will be of a busy machine")
    notes = [f"{load:.0%} of the cores in use by others at the start"]
    if effort.lengths == QUICK.lengths:
        notes.append("rough: measured with --quick")
    if asking is not None:
        sets = ", ".join(sorted({query.dataset for query in asking.queries}))
        notes.append(
            f"output_tokens and quality: {len(asking.queries)} queries of {sets}, "
            f"at most {asking.max_tokens} tokens, temperature 0"
        )
    else:
        notes.append(
            f"output_tokens: plain questions, at most {effort.max_tokens} tokens; quality: the cards' priors"
        )
    return tuple(notes)


def tell_kept(kept: Profile | None, cards: Cards, out: Path) -> None:
    """After Ctrl-C."""
    done = list(kept.models) if kept else []
    missing = [name for name in cards if name not in done]
    click.echo(err=True)
    if done:
        note(f"{out} has {', '.join(done)}" + (f"; missing: {', '.join(missing)}" if missing else ""))
    note("the same command goes on where this one stopped")


def report(surveyed: Surveyed, out: Path) -> None:
    """Where it is, and what is not in it."""
    for name, reason in surveyed.problems.items():
        warn(f"{name}: {reason}")
    note(f"{out}: {count(len(surveyed.profile.models), 'model')}; `calm replay` takes it with --profile")
