"""Pictures of what a trace says, as files in memory: arrays and names in, bytes of a PNG, SVG or PDF out.

Owns colours and layout. Nothing of the user's own settings of matplotlib has a say, and no display is needed. Knows
nothing of traces, pages or the disk.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .policies import POLICIES
from .settings import DEFAULT_POLICY
from .simulate import BELADY, Replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

    from .scores import Spread

__all__ = [
    "DOTS_PER_INCH",
    "FORMATS",
    "activation",
    "activation_by_domain",
    "distances",
    "hit_rates",
    "reuse",
    "speeds",
]

FORMATS = ("pdf", "png", "svg")

Floats = NDArray[np.float64]
DOTS_PER_INCH = 150
_WIDTH_INCHES = 9.0
_COLUMNS = 4
_METADATA: dict[str, dict[str, Any]] = {
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
    "svg": {"Date": None},
}
"""What would make two pictures of the same numbers differ is left out."""

_SHARE = "share of the layer's choices"
_RANK = "experts of the layer, by their use over all: 0 is the most used"
_INK, _PALE, _NOTHING = "#24292f", "#d0d7de", "#e7eaed"
_MEASURED, _YARDSTICK = "#0072b2", "#a8b3bf"
_COLOURS = ("#cc6677", "#117733", "#ddcc77", "#88ccee", "#aa4499", "#44aa99", "#999933", "#882255", "#7f7f7f")
"""Paul Tol's muted scheme, made for all kinds of colour vision; dashes and markers tell the lines apart without it."""
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (7, 2)), (0, (1, 1)))
_HATCHES = ("", "//", "..", "xx", "--", "oo")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h")
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _PALE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "grid.color": _NOTHING,
    "legend.frameon": False,
    "svg.hashsalt": "moeinf",
    "text.color": _INK,
    "text.parse_math": False,  # a name may have dollars in it
    "xtick.color": _INK,
    "ytick.color": _INK,
}


def activation(shares: Floats, sizes: Sequence[int], order: NDArray[np.intp]) -> bytes:
    """Layers x experts, as colours: `shares` [layers, experts] of a layer's choices, the experts of each layer in the
    given `order` [layers, experts]; a layer has so many experts as `sizes` says.
    """
    cells = _ordered(shares, sizes, order)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = _heatmap(axes, cells, _top(cells))
        axes.set(xlabel=_RANK, ylabel="layer")
        _explain_colours(figure, image, [axes], _SHARE, "max")

    return _drawn(draw, min(6.5, 2.0 + 0.1 * len(sizes)))


def activation_by_domain(shares: Floats, names: Sequence[str], sizes: Sequence[int], order: NDArray[np.intp]) -> bytes:
    """A small `activation` for each domain, all in one order and one scale of colours; `shares` [domains, layers,
    experts].
    """
    cells = [_ordered(one, sizes, order) for one in shares]
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes, name, one in zip(grid, names, cells, strict=False):
            image = _heatmap(axes, one, _top(np.array(cells)))
            axes.set_title(_label(name))
        for axes in grid[len(names) :]:
            axes.set_axis_off()
        figure.supxlabel(_RANK, fontsize=9)
        figure.supylabel("layer", fontsize=9)
        _explain_colours(figure, image, grid, _SHARE, "max")

    return _drawn(draw, 0.7 + rows * min(2.4, 1.0 + 0.05 * len(sizes)))


def distances(values: Floats, names: Sequence[str]) -> bytes:
    """The mean distances between domains [domains, domains], nan where there is none, as colours and numbers."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        image = axes.imshow(values, cmap=_colours("viridis_r"))
        labels = [_label(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), labels)
        _bare(axes)
        middle = np.mean(image.get_clim())
        for (row, column), value in np.ndenumerate(values):
            if not math.isnan(value):
                colour = "white" if value > middle else _INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7.5)
        _explain_colours(figure, image, [axes], "mean distance of requests", "neither")

    return _drawn(draw, 1.8 + 0.36 * len(names), width=3.2 + 0.42 * len(names))


def reuse(windows: Sequence[tuple[int, float, float]], named: Sequence[tuple[str, float]]) -> bytes:
    """Two rows of bars. `windows`: tokens, the chance of reuse within them, and what even use would give. `named`: who
    names the next experts, and the share that is right, the yardstick last. Either may be empty.
    """

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for offset, place, label, colour in ((-0.2, 1, "measured", _MEASURED), (0.2, 2, "even use", _YARDSTICK)):
            heights = [window[place] for window in windows]
            bars = left.bar(np.arange(len(windows)) + offset, heights, 0.38, label=label, color=colour)
            left.bar_label(bars, fmt="{:.0%}", padding=2)
        left.set_xticks(range(len(windows)), [_within(tokens) for tokens, _, _ in windows])
        left.set_title("An expert is used again …")
        left.legend(loc="upper left", frameon=True, edgecolor="none")
        colours = [_MEASURED] * (len(named) - 1) + [_YARDSTICK]
        bars = right.bar(range(len(named)), [share for _, share in named], 0.6, color=colours[: len(named)])
        right.bar_label(bars, fmt="{:.0%}", padding=2)
        right.set_xticks(range(len(named)), [textwrap.fill(name, 16) for name, _ in named])
        right.set_title("The next token's experts are named rightly by …")
        for axes in (left, right):
            _percent(axes, "y")
            axes.set_ylim(0, 1.12)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
            axes.grid(visible=False, axis="x")
            axes.tick_params(length=0)

    return _drawn(draw, 3.2)


def hit_rates(
    curves: Sequence[tuple[str, Sequence[Replay]]],
    order: Sequence[str],
    mark: Replay | None = None,
    kind: str = "png",
) -> bytes:
    """Hit rate over the size of the cache, a line per policy, under one another for each of `curves`, which are a title
    and replays. `order` is that of the legend; `mark` is a size to point at; `kind` is one of FORMATS.
    """

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(len(curves), 1, squeeze=False).flat)
        for axes, (title, replays) in zip(grid, curves, strict=True):
            drawn = [*replays, mark] if mark else replays
            for policy in order:
                points = sorted({(one.fraction, one.hit_rate) for one in drawn if one.policy == policy})
                axes.plot(*zip(*points, strict=True), label=policy, clip_on=False, **_line(policy))
            _percent(axes, "x")
            _percent(axes, "y")
            axes.set_xlim(0, 1.02 * max(one.fraction for one in drawn))
            axes.set_ylim(0, 1)
            axes.set(xlabel="experts in memory, of all", ylabel="hit rate")
            axes.set_title(_label(title, 90))
            if mark:
                _point_at(axes, mark)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right upper", handlelength=3.5)

    return _drawn(draw, 0.4 + 4.4 * len(curves), kind=kind)


def speeds(
    groups: Sequence[tuple[str, Sequence[tuple[str, Spread, float | None]]]], title: str, kind: str = "png"
) -> bytes:
    """Tokens per second as bars with whiskers, a group for each budget. A group is its name and, for each system, its
    label, its speed, and the share of what the machine allows, where that is known.
    """
    labels = list(dict.fromkeys(label for _, bars in groups for label, _, _ in bars))
    width = 0.8 / max(len(labels), 1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, label in enumerate(labels):
            found = [(place, *bar[1:]) for place, (_, bars) in enumerate(groups) for bar in bars if bar[0] == label]
            bars = axes.bar(
                [place + (number - (len(labels) - 1) / 2) * width for place, _, _ in found],
                [speed.median for _, speed, _ in found],
                0.92 * width,
                yerr=[
                    [speed.median - speed.min for _, speed, _ in found],
                    [speed.max - speed.median for _, speed, _ in found],
                ],
                label=_label(label, 48),
                color=_MEASURED if label.startswith("moeinf") else _YARDSTICK,
                hatch=_HATCHES[number % len(_HATCHES)],
                edgecolor="white",
                error_kw={"elinewidth": 1, "ecolor": _INK},
            )
            shares = ["" if share is None else f"\nη {share:.2f}" for _, _, share in found]
            texts = [f"{speed.median:.3g}{share}" for (_, speed, _), share in zip(found, shares, strict=True)]
            axes.bar_label(bars, texts, padding=2, fontsize=8)
        axes.margins(y=0.15)
        axes.set_xticks(range(len(groups)), [name for name, _ in groups])
        axes.set_ylabel("tokens per second while decoding")
        axes.set_title(textwrap.fill(_label(title, 200), 100))
        axes.grid(visible=False, axis="x")
        axes.tick_params(axis="x", length=0)
        if labels:
            figure.legend(loc="outside lower center", ncols=4)

    return _drawn(draw, 4.6, kind=kind)


def _drawn(draw: Callable[[Figure], None], height: float, *, width: float = _WIDTH_INCHES, kind: str = "png") -> bytes:
    """A figure that `draw` fills, `width` x `height` inches, as a file of this kind."""
    import matplotlib
    from matplotlib.figure import Figure

    defaults: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
    }
    with matplotlib.rc_context({**defaults, **_STYLE}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # in a name; the page has it as text
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
        draw(figure)
        file = BytesIO()
        figure.savefig(file, format=kind, metadata=_METADATA[kind])
        return file.getvalue()


def _ordered(shares: Floats, sizes: Sequence[int], order: NDArray[np.intp]) -> Floats:
    """The experts of each layer in `order`, those that a layer does not have as nan, at its end."""
    exist = np.arange(shares.shape[1]) < np.array(sizes)[:, None]
    return np.take_along_axis(np.where(exist, shares, np.nan), order, axis=1)


def _top(cells: Floats) -> float:
    """Where the scale of colours ends: a few outliers must not make all others look the same."""
    return float(np.nanpercentile(cells, 99.5)) or 1.0


def _heatmap(axes: Axes, cells: Floats, top: float) -> AxesImage:
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(cells, cmap=_colours("viridis"), vmin=0, vmax=top, aspect="auto", interpolation="nearest")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    _bare(axes)
    return image


def _colours(name: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=_NOTHING)


def _bare(axes: Axes) -> None:
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _explain_colours(figure: Figure, image: AxesImage, axes: list[Axes], label: str, extend: str) -> None:
    bar = figure.colorbar(image, ax=axes, label=label, extend=extend, aspect=figure.get_figheight() / 0.13, pad=0.02)
    bar.outline.set_visible(False)
    if label == _SHARE:
        _percent(bar.ax, "y")


def _percent(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{100 * value:g}%")


def _point_at(axes: Axes, mark: Replay) -> None:
    axes.axvline(mark.fraction, color=_INK, linewidth=0.8)
    axes.plot([mark.fraction], [mark.hit_rate], "o", color=_INK, markersize=8, fillstyle="none")
    is_left = mark.fraction > axes.get_xlim()[1] / 2
    axes.annotate(
        f"{mark.slots:,} experts find {mark.hit_rate:.0%}",
        (mark.fraction, 0.04),
        xytext=(-6 if is_left else 6, 0),
        textcoords="offset points",
        ha="right" if is_left else "left",
    )


def _line(policy: str) -> dict[str, Any]:
    """Colour, dashes and marker of a policy: the same in every picture, no two alike."""
    if policy == BELADY:
        return {"color": _INK, "linestyle": (0, (4, 2)), "linewidth": 1.8, "marker": ".", "zorder": 4}
    if policy == DEFAULT_POLICY:
        return {"color": _MEASURED, "linestyle": "-", "linewidth": 2.8, "marker": "o", "markersize": 6, "zorder": 3}
    number = [name for name in sorted(POLICIES) if name != DEFAULT_POLICY].index(policy)
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _LINES[number % len(_LINES)],
        "linewidth": 1.2,
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
    }


def _within(tokens: int) -> str:
    return "by the next token" if tokens == 1 else f"within {tokens} tokens"


def _label(text: str, most: int = 24) -> str:
    """A name that fits: on one line, and not too long."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
