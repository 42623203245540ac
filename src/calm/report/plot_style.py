"""What all pictures share: type, colours that everybody can tell apart, names, units, and files that repeat.

Colours are Okabe and Ito's (2008), which stay distinct under every common colour blindness. A policy has one
colour in all figures of a study; the cache (and goal, queue, engine) changes marker and dash. Yellow is left
out for lines, since it cannot be seen on white.

matplotlib is imported inside functions: `calm --help` must stay quick, and serving does not need it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from calm.errors import BadInput
from calm.report.intervals import MISSING_EXTRA
from calm.report.records import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

BLACK, GREY, LIGHT, FAINT = "#000000", "#5f5f5f", "#b4b4b4", "#e4e4e4"
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, YELLOW = "#E69F00", "#56B4E9", "#F0E442"
LINES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
FILLS = (BLUE, ORANGE, GREEN, SKY, PURPLE, YELLOW, VERMILLION)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (4, 1.5),
    (1.2, 1.2),
    (6, 1.5, 1.2, 1.5),
    (8, 2),
    (2.5, 1),
    (5, 1, 1, 1, 1, 1),
)
OURS = "calm"
PAGE_IN = 7.16
"""Width of two columns of a paper, in inches; one column is 3.5."""
PNG_DPI = 200
MOST_SETUPS = 12
STYLE: Mapping[str, object] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "calm",
}


class Look(NamedTuple):
    """How one setup is drawn, in every figure of a study."""

    name: str
    colour: str
    marker: str
    dashes: tuple[float, ...]


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with our settings, others' left as they were. Raises BadInput where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise BadInput(f"plots need matplotlib: {MISSING_EXTRA}", field="plots") from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def new_figure(width_in: float, height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """NAME.png and NAME.svg, without a date: equal figures give equal files."""
    directory.mkdir(parents=True, exist_ok=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # one layout for both files
    png, svg = directory / f"{name}.png", directory / f"{name}.svg"
    figure.savefig(png, dpi=PNG_DPI, metadata={"Software": None})
    figure.savefig(svg, metadata={"Date": None, "Creator": None})
    return [png, svg]


# --- who is who ---------------------------------------------------------------------------------

Group = Sequence[Trial]


def looks(groups: Sequence[Group]) -> list[Look]:
    """One per group of trials: colour by policy, marker and dash by all else that tells setups apart."""
    firsts = [trials[0] for trials in groups]
    policies = sorted(
        dict.fromkeys(trial.setup.policy for trial in firsts), key=lambda policy: policy != OURS
    )
    variants = list(dict.fromkeys(_variant(trial) for trial in firsts))
    found = []
    for trial, name in zip(firsts, names(firsts), strict=True):
        round_, place = divmod(policies.index(trial.setup.policy), len(LINES))
        variant = variants.index(_variant(trial)) + round_
        dashes = DASHES[variant % len(DASHES)]
        found.append(Look(name, LINES[place], MARKERS[variant % len(MARKERS)], dashes))
    return found


def names(trials: Sequence[Trial]) -> list[str]:
    """What tells them apart, without what all of them share: one cache or one goal for all is not named."""
    setups = [trial.setup for trial in trials]
    policies = {setup.policy for setup in setups}
    caches = {setup.cache for setup in setups}
    engines = {trial.engine for trial in trials}
    goals = {setup.goal for setup in setups}
    return [
        _name(
            trial,
            policy=len(policies) > 1 or len(caches) == 1,
            cache=len(caches) > 1,
            goal=len(goals) > 1,
            engine=len(engines) > 1,
        )
        for trial in trials
    ]


def _name(trial: Trial, *, policy: bool, cache: bool, goal: bool, engine: bool) -> str:
    setup = trial.setup
    main = " / ".join(part for part, shown in ((setup.policy, policy), (setup.cache, cache)) if shown)
    queue = setup.queue if setup.queue != "fifo" else None
    extras = (setup.goal if goal else None, queue, trial.engine if engine else None)
    said = ", ".join(extra for extra in extras if extra)
    return f"{main} ({said})" if said else main


def _variant(trial: Trial) -> tuple[str | None, ...]:
    return (trial.setup.cache, trial.setup.queue, trial.setup.goal, trial.engine)


def scenarios(groups: Iterable[Group]) -> list[str]:
    return list(dict.fromkeys(trials[0].setup.scenario for trials in groups))


def first_few(groups: Sequence[Group], title: str) -> tuple[Sequence[Group], str]:
    """At most twelve setups: more cannot be told apart. The title says what is left out."""
    if len(groups) <= MOST_SETUPS:
        return groups, title
    return groups[:MOST_SETUPS], f"{title} (the first {MOST_SETUPS} of {len(groups)} setups)"


def titled(scenario: str, title: str) -> str:
    return f"{title}, {scenario}" if scenario else title


def model_colours(models: Sequence[str]) -> dict[str, str]:
    """For areas, paler than the lines, so that a model is not taken for a policy.

    Models beyond the palette have none and are drawn together as the rest.
    """
    return {model: tint(colour) for model, colour in zip(models, FILLS, strict=False)}


def tint(colour: str, white: float = 0.35) -> str:
    """The colour mixed with a share of white."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in parts)


# --- axes ---------------------------------------------------------------------------------------


class TimeUnit(NamedTuple):
    """Divides seconds for an axis."""

    seconds: float
    name: str


def time_unit(longest_s: float) -> TimeUnit:
    for unit in (TimeUnit(3600, "h"), TimeUnit(60, "min")):
        if longest_s >= 3 * unit.seconds:
            return unit
    return TimeUnit(1, "s")


def scale_of(values: Sequence[float], *, ratio: float = 12) -> Literal["log", "linear"]:
    """Logarithmic where positive values span more than `ratio`."""
    spans = bool(values) and min(values) > 0 and max(values) / min(values) > ratio
    return "log" if spans else "linear"


def plain_log(axes: Axes, axis: Literal["x", "y"]) -> None:
    """0.1, 1, 10 in place of powers of ten, and figures between the decades where few decades are shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    line = axes.xaxis if axis == "x" else axes.yaxis
    low, high = sorted(axes.get_xlim() if axis == "x" else axes.get_ylim())
    narrow = low > 0 and high / low < 60
    line.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    line.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    line.set_minor_formatter(NullFormatter())


# --- labels beside points -----------------------------------------------------------------------


class Box(NamedTuple):
    """In pixels."""

    x0: float
    y0: float
    x1: float
    y1: float

    def overlap(self, other: Box) -> float:
        width = min(self.x1, other.x1) - max(self.x0, other.x0)
        height = min(self.y1, other.y1) - max(self.y0, other.y0)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.x1 - self.x0) * (self.y1 - self.y0)


DIRECTIONS = ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1))
RADII_PT = (5.0, 10.0, 16.0, 24.0, 34.0, 46.0)


def label_points(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], obstacles: Sequence[Box]
) -> list[Annotation]:
    """Writes each text beside its point where it covers least; a thin line leads to those further away.

    The figure must have its final layout. Greedy, in order: what comes first gets the better place.
    """
    frame = Box(*axes.get_window_extent().extents)
    taken = list(obstacles)
    drawn = []
    for point, text in zip(points, texts, strict=True):
        note = axes.annotate(
            text,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=7,
            color=BLACK,
            annotation_clip=False,
        )
        note.set_in_layout(False)
        box = _placed(axes, note, point, frame, taken)
        taken.append(box)
        drawn.append(note)
    return drawn


def _placed(
    axes: Axes, note: Annotation, point: tuple[float, float], frame: Box, taken: Sequence[Box]
) -> Box:
    scale = axes.figure.dpi / 72
    extent = note.get_window_extent()
    x, y = axes.transData.transform(point)
    options = [
        (_cost(box, frame, taken, radius), radius, box)
        for radius in RADII_PT
        for direction in DIRECTIONS
        for box in [_beside(x, y, extent.width, extent.height, direction, radius * scale)]
    ]
    _, radius, box = min(options, key=lambda option: option[0])
    note.set_position(((box.x0 - x) / scale, (box.y0 - y) / scale))
    note.set_verticalalignment("bottom")
    if radius > RADII_PT[0]:
        _lead(axes, (x, y), box)
    return box


def _beside(
    x: float, y: float, width: float, height: float, direction: tuple[int, int], radius: float
) -> Box:
    """The text's box at a distance from the point: beside it, above it or below it."""
    across, up = direction
    left = x + across * radius - (0 if across > 0 else width if across < 0 else width / 2)
    base = y + up * radius - (0 if up > 0 else height if up < 0 else height / 2)
    return Box(left, base, left + width, base + height)


def _cost(box: Box, frame: Box, taken: Sequence[Box], radius: float) -> float:
    """Covered area in parts of the label's own, dearly; leaving the axes, dearer; distance, cheaply."""
    outside = 1 - box.overlap(frame) / max(box.area, 1.0)
    covered = sum(box.overlap(other) for other in taken) / max(box.area, 1.0)
    return 12 * covered + 25 * outside + radius / 20


def _lead(axes: Axes, start: tuple[float, float], box: Box) -> None:
    from matplotlib.lines import Line2D

    end = (min(max(start[0], box.x0), box.x1), min(max(start[1], box.y0), box.y1))
    line = Line2D([start[0], end[0]], [start[1], end[1]], color=LIGHT, linewidth=0.5, zorder=1)
    line.set_in_layout(False)
    axes.add_line(line)
    line.set_transform(axes.transData)
    inverse = axes.transData.inverted()
    line.set_data(*zip(*(inverse.transform(pixel) for pixel in (start, end)), strict=True))
