"""The chart: one row of bars a case."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .records import Results, Spread

#: The cases that the README is about; all of them would not fit a page.
SHOWN = (
    "cold_minilm",
    "cold_llama",
    "cold_llama_250",
    "load_llama",
    "tensors_llama",
    "fetch_llama",
    "wire_llama",
    "warm_cold",
)


def draw(found: Sequence[Results], path: Path) -> bool:
    """Draw one row of bars for each of :data:`SHOWN` into *path*; without matplotlib nothing is drawn.

    Returns:
        Whether it was drawn.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fastload", "font.family": "sans-serif"})
    pyplot = import_module("matplotlib.pyplot")
    shown = [results for results in found if results.name in SHOWN]
    if not shown:
        return False
    rows = [len(results.runs) for results in shown]
    figure, axes = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.42 * sum(rows) + 0.75 * len(rows)), height_ratios=rows, squeeze=False
    )
    for results, (axis,) in zip(shown, axes, strict=True):
        _bars(results, axis)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True


def _bars(results: Results, axis: Any) -> None:
    outside = results.imports if results.header["clock"] == "call" else None
    names = [name for name in results.runs if name != outside]
    spreads = [Spread.of([results.seconds(r) for r in results.runs[name]]) for name in names]
    medians = [s.median for s in spreads]
    whiskers = [[s.median - s.least for s in spreads], [s.most - s.median for s in spreads]]
    colours = [
        "#ced4da" if results.is_reference(n) else "#d9480f" if n.startswith("fastload") else "#868e96" for n in names
    ]
    axis.barh(range(len(names)), medians, xerr=whiskers, color=colours, ecolor="#343a40", capsize=2)
    axis.set_yticks(range(len(names)), [results.title(name) for name in names])
    axis.invert_yaxis()
    for row, spread in enumerate(spreads):
        axis.annotate(
            f"{spread.median:.2f} s", (spread.most, row), xytext=(5, 0), textcoords="offset points", va="center"
        )
    axis.margins(x=0.12)
    model = results.header["model"]
    axis.set_title(f"{results.name}: {model['name']}, {model['bytes'] / 1e6:,.0f} MB", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
