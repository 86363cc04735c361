"""Draws the plots of ``docs`` from the committed results: ``python -m benchmarks.quality_plots``.

The first is the paper's figure 9 with ground truth in place of CLIP and LPIPS: along eta, the share of successful edits
against the share that keeps what it must, for known photos and for strangers. The second shows quality against the size
of the edit file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from .compared import FULL_SAMPLED_ALIKE
from .goals import REPOSITORY
from .quality_tables import FULL, results
from .scene_edits import HALVES, STRANGERS, TEST, VALIDATION

DOCS = REPOSITORY / "docs"
CURVES = (
    FULL,
    FULL_SAMPLED_ALIKE,
    "balanced",
    "source",
    "once",
    "fast",
    "lora-as-published",
    "embedding-only",
    "sdedit",
    "ddim-inversion",
    "semantic-guidance",
)
"""Methods with a curve."""
SIZES = (
    "keep-all",
    "balanced",
    "small",
    "rank-4",
    "rank-4-truncated",
    "rank-32",
    "adapt-attn",
    "adapt-attn-ff",
    "decoder-only",
)
"""Variants with different contents of the edit file."""
_LABEL_PX = (18, 10)
"""Least distance of two labels."""


def curves(measured: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Success against background for known photos, and against the pattern's overlap for strangers, along eta.

    A ring is around the eta that validation chose.
    """
    figure, (known, strangers) = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    labels: dict[Any, list[tuple[str, tuple[float, float], str]]] = {known: [], strangers: []}
    for axes, half, kept in zip((known, strangers), HALVES, ("background_db", "overlap"), strict=True):
        for name in (name for name in CURVES if name in measured):
            points = [point for point in measured[name]["curve"] if point["eta"] > 0]
            x = [point[half]["all"][kept]["value"] for point in points]
            y = [100 * point[half]["all"]["success"]["value"] for point in points]
            [line] = axes.plot(x, y, marker="o", markersize=5, label=name)
            etas = [point["eta"] for point in points]
            chosen = etas.index(measured[name]["eta"])
            axes.plot(x[chosen], y[chosen], marker="o", markersize=11, mfc="none", color=line.get_color())
            own = zip(etas, zip(x, y, strict=True), strict=True)
            labels[axes] += [(f"{eta:g}", point, line.get_color()) for eta, point in own]
        axes.set_title(half)
        axes.grid(alpha=0.3)
    known.set_xlabel("median background PSNR to the photo, dB")
    strangers.set_xlabel("overlap of the pattern with the ground truth's")
    known.set_ylabel("edits that show what was asked for, %")
    # Below both, where it hides no point.
    figure.legend(*known.get_legend_handles_labels(), loc="outside lower center", ncol=8, frameon=False)
    # Where a point is on paper is known only now.
    figure.canvas.draw()
    for axes, own_labels in labels.items():
        _label(axes, own_labels)
    _saved(figure, path)


def _label(axes: Any, labels: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Writes labels (text, point, colour) beside their points, where there is room for them."""
    taken: list[tuple[float, float]] = []
    for text, point, color in labels:
        x, y = axes.transData.transform(point)
        if all(abs(x - left) > _LABEL_PX[0] or abs(y - height) > _LABEL_PX[1] for left, height in taken):
            taken.append((x, y))
            axes.annotate(text, point, fontsize=7, color=color, xytext=(5, 5), textcoords="offset points")


def sizes(validation: Mapping[str, dict[str, Any]], test: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Share of good strangers against bytes of the edit file; hollow for validation, full for the test set."""
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, name in enumerate(name for name in SIZES if name in validation):
        for found, look in ((validation, {"mfc": "white", "alpha": 0.5}), (test, {})):
            if name not in found:
                continue
            good = found[name]["at_eta"][STRANGERS]["all"]["good"]
            low, middle, high = (
                100 * share for share in (good["interval_95"][0], good["value"], good["interval_95"][1])
            )
            # Labels side by side, as the two have the same size.
            kilobytes = found[name]["cost"]["edit_bytes_mean"] / 1000 * (1 if found is validation else 1.04)
            bars = [[middle - low], [high - middle]]
            axes.errorbar(kilobytes, middle, bars, marker="o", capsize=3, color=f"C{number}", **look)
            if found is validation:
                axes.annotate(name, (1.04 * kilobytes, middle), fontsize=8, xytext=(4, 4), textcoords="offset points")
    # Space for the last label.
    axes.margins(x=0.12)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("edit file, kB")
    axes.set_ylabel("good items among strangers, %")
    axes.grid(alpha=0.3)
    _saved(figure, path)


def _saved(figure: Any, path: Path) -> None:
    """Writes the figure; without a date, equal figures are equal files."""
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Draws every plot that has results."""
    pyplot.switch_backend("agg")
    test, validation = results(TEST.name), results(VALIDATION.name)
    # The validation set, which has more methods.
    if validation:
        curves(validation, DOCS / "quality_curves.png")
    if len(set(SIZES) & set(validation)) > 1:
        sizes(validation, test, DOCS / "quality_sizes.png")


if __name__ == "__main__":
    main()
