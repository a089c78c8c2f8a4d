"""The report's plots, drawn with matplotlib; every function returns a figure.

Colours are those of Okabe and Ito (2008), which stay apart for colour-blind readers.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.stats import spearmanr

from steersman.report.overoptimisation import Look, recommended
from steersman.report.schema import Evaluation, RewardModelEvaluation
from steersman.report.summary import criteria, label
from steersman.statistics import (
    expected_calibration_error,
    mean_interval,
    wilson_interval,
)

GREY, BLUE, ORANGE, GREEN, SKY, RED = "#8c8c8c", "#0072b2", "#d55e00", "#009e73", "#56b4e9", "#cc79a7"
INK, FAINT = "#222222", "#d9d9d9"
ON_BAR = "#101418"
"""Ink on a light bar, which stays light on a dark page."""
_DARK = {
    INK: "#e6e9ee", FAINT: "#3a414b", GREY: "#9a9a9a", BLUE: "#5ab0f0", ORANGE: "#ff8f4a", GREEN: "#3fc79a",
    SKY: "#7cc8f2", RED: "#e09fc9",
}  # fmt: skip
_MOST_POINTS = 2000
"""Of a scatter that is drawn one by one; more of them become a picture within the drawing."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.hashsalt": "steersman",
}
CURVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Reward", "mean reward per answer", ("reward", "reward_mean", "score", "rewards_mean")),
    ("KL to the reference", "nats per answer", ("kl", "kl_mean", "objective_kl")),
    ("Policy loss", "loss", ("policy_loss", "loss_policy", "pg_loss")),
    ("Value loss", "loss", ("value_loss", "loss_value", "vf_loss", "critic_loss")),
    ("Loss", "loss", ("loss", "train_loss", "eval_loss")),
    ("Accuracy", "share of pairs", ("accuracy", "eval_accuracy", "rewards_accuracies")),
    ("Answer length", "tokens", ("response_length", "length", "length_mean", "response_tokens")),
    ("Cut before the end", "share of answers", ("no_eos",)),
    ("Entropy", "nats per token", ("entropy",)),
)
"""Panels of the training plot: title, unit, and the metric names that belong into it."""


def colours(models: Sequence[str]) -> dict[str, str]:
    """One colour per model: grey before, blue in the middle, orange for the aligned model."""
    middle = (BLUE, SKY, GREEN, RED)
    palette = {name: middle[index % len(middle)] for index, name in enumerate(models[1:-1])}
    return {**palette, models[0]: GREY, models[-1]: ORANGE}


def as_image(figure: Figure) -> str:
    """The figure as the address of an SVG picture that follows the reader's choice of light or dark."""
    buffer = io.BytesIO()
    with rc_context(STYLE):
        # Without a date the bytes are the same for the same matplotlib.
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": "steersman"})
    text = buffer.getvalue().decode()
    variables = {colour: f"--c{number}" for number, colour in enumerate(_DARK)}
    for colour, name in variables.items():
        text = text.replace(f": {colour}", f": var({name})")
    light = "".join(f"{name}:{colour};" for colour, name in variables.items())
    dark = "".join(f"{variables[colour]}:{other};" for colour, other in _DARK.items())
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    text = text[:start] + style + text[start:]
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def training_curves(stage: str, metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Reward, KL, losses and length of one stage over its steps; None if the metrics hold none of them."""
    panels = []
    for title, unit, names in CURVES:
        series = {}
        for key in dict.fromkeys(key for row in metrics for key in row):
            if key.replace("/", "_").replace("train_", "") in names or key.rsplit("/", 1)[-1] in names:
                found = [
                    (row.get("step", index), row[key])
                    for index, row in enumerate(metrics)
                    if isinstance(row.get(key), int | float) and np.isfinite(row[key])
                ]
                if len(found) > 1:
                    series[key] = np.array(found, dtype=float)
        if series:
            panels.append((title, unit, series))
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 2.6 * rows + 0.35))
        figure.suptitle(f"Stage {stage}", x=0.01, ha="left", fontweight="bold")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, (title, unit, series) in zip(axes, panels, strict=False):
            for (key, points), colour in zip(series.items(), (BLUE, ORANGE, GREEN, RED), strict=False):
                _curve(ax, points, colour, key if len(series) > 1 else None)
            ax.set(title=title, xlabel="step", ylabel=unit)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if len(series) > 1:
                ax.legend(fontsize=8)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        return figure


def _curve(ax: Axes, points: np.ndarray, colour: str, name: str | None) -> None:
    """The raw series faintly, and its running mean where it is long enough to need one."""
    steps, values = points[:, 0], points[:, 1]
    if len(values) < 12:
        ax.plot(steps, values, color=colour, marker="o", markersize=3.5, label=name)
        return
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    reach = max(1, len(values) // 20)
    smooth = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    ax.plot(steps, smooth, color=colour, label=name)


def reward_distributions(evaluation: Evaluation) -> Figure:
    """Rewards of every model, and the change per prompt from the start to the aligned model."""
    models = list(evaluation.models)
    colour = colours(models)
    scores = {name: np.array(list(evaluation.scores(name).values())) for name in models}
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.7))
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        rng = np.random.default_rng(0)
        for place, name in enumerate(models):
            values = scores[name]
            if values.std() > 0:
                body = left.violinplot(values, positions=[place], widths=0.85, side="high", showextrema=False)
                for patch in body["bodies"]:
                    patch.set(facecolor=colour[name], alpha=0.35, edgecolor="none")
            jitter = place - 0.06 - 0.22 * rng.random(len(values))
            left.scatter(
                jitter, values, s=9, color=colour[name], alpha=0.55, linewidths=0, rasterized=len(values) > _MOST_POINTS
            )
            mean = evaluation.interval(name)
            left.errorbar(
                place, mean.estimate, [[mean.estimate - mean.low], [mean.high - mean.estimate]],
                fmt="o", color=INK, markersize=5, capsize=4, linewidth=1.5, zorder=3,
            )  # fmt: skip
            left.annotate(
                f"{mean.estimate:.2f}", (place, mean.estimate), (9, 4), textcoords="offset points", weight="bold"
            )
        left.set_xticks(range(len(models)), [label(name) for name in models])
        left.set(title="Reward by model, mean and 95% interval", ylabel="reward", xlim=(-0.5, len(models) - 0.4))
        left.grid(axis="x", visible=False)
        _paired_change(right, evaluation)
        return figure


def _paired_change(ax: Axes, evaluation: Evaluation) -> None:
    change = np.array(evaluation.changes(evaluation.start, evaluation.aligned))
    result = evaluation.change(evaluation.start, evaluation.aligned)
    width = float(np.ptp(change)) / min(24, max(6, len(change) // 4)) or 1.0
    # One edge lies on zero, so that no bar holds gains and losses together.
    edges = (width * np.arange(np.floor(change.min() / width), np.floor(change.max() / width) + 2)).tolist()
    ax.hist(change[change >= 0], edges, color=ORANGE, alpha=0.8, label=f"better ({result.wins})")
    ax.hist(change[change < 0], edges, color=GREY, alpha=0.8, label=f"worse ({result.losses})")
    ax.axvspan(result.difference.low, result.difference.high, color=INK, alpha=0.15, linewidth=0)
    ax.axvline(result.difference.estimate, color=INK, linewidth=1.5)
    ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    ax.set(
        title=f"Change per prompt, {label(evaluation.start)} → {label(evaluation.aligned)}",
        xlabel=f"difference of reward; mean {result.difference.estimate:+.2f} "
        f"[{result.difference.low:+.2f}, {result.difference.high:+.2f}]",
        ylabel="prompts",
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8.5)


def rubric_by_criterion(evaluation: Evaluation) -> Figure | None:
    """Every criterion of the exact rubric for every model; None where no rubric applies."""
    names = criteria(evaluation)
    if not names:
        return None
    names = ["total", *names]
    models = list(evaluation.models)
    colour = colours(models)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.62 * len(names) + 1.3))
        ax = figure.subplots()
        for row, criterion in enumerate(names):
            for index, model in enumerate(models):
                mean = evaluation.interval(model, criterion)
                y = row + 0.2 * (index - (len(models) - 1) / 2)
                low, high = max(0.0, mean.low), min(1.0, mean.high)
                ax.plot((low, high), (y, y), color=colour[model], linewidth=2.2, solid_capstyle="round", alpha=0.6)
                ax.scatter(
                    mean.estimate, y, s=46, color=colour[model], zorder=3, edgecolors="white", linewidths=0.8,
                    label=label(model) if row == 0 else None,
                )  # fmt: skip
        ax.set_yticks(range(len(names)), [label(name) for name in names])
        ax.get_yticklabels()[0].set_fontweight("bold")
        ax.axhline(0.5, color=INK, linewidth=0.8)
        ax.invert_yaxis()
        ax.set(
            title="Exact rubric, which training never sees", xlabel="mean score with 95% interval", xlim=(-0.02, 1.03)
        )
        ax.grid(axis="y", visible=False)
        ax.legend(loc="lower center", bbox_to_anchor=(0.82, 1.0), ncols=len(models))
        return figure


def reward_model_quality(model: RewardModelEvaluation) -> Figure:
    """Left: is a stated probability the observed share? Right: accuracy by how clear the preference was."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.7))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
        bins = model.calibration
        left.plot((0.5, 1), (0.5, 1), color=INK, linestyle=":", linewidth=1, label="perfect")
        for part in bins:
            left.plot(
                (part.predicted,) * 2, (part.observed.low, part.observed.high), color=BLUE, alpha=0.5, linewidth=2
            )
        left.plot(
            [part.predicted for part in bins], [part.observed.estimate for part in bins], "o-", color=BLUE,
            label=f"calibration error {expected_calibration_error(bins):.3f}",
        )  # fmt: skip
        left.set(title="Calibration", xlabel="how sure the reward model is", ylabel="how often it is right")
        left.set(xlim=(0.48, 1.02), ylim=(min(0.48, *(part.observed.low for part in bins)) - 0.02, 1.02))
        for axis in (left.xaxis, left.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        left.legend(loc="lower right", fontsize=8.5)
        _accuracy_by_margin(right, model)
        return figure


def _accuracy_by_margin(ax: Axes, model: RewardModelEvaluation) -> None:
    correct = np.array(model.correct)
    margins = np.array([np.nan if pair.margin is None else pair.margin for pair in model.pairs])
    levels = sorted({float(margin) for margin in margins if np.isfinite(margin)})
    if len(levels) > 5:  # a continuous margin: quartiles
        edges = np.unique(np.nanquantile(margins, (0, 0.25, 0.5, 0.75, 1)))
        spans = pairwise(edges)
        groups = [(f"{a:.2g}–{b:.2g}", (margins >= a) & ((margins < b) | (b == edges[-1]))) for a, b in spans]
    else:
        groups = [(f"{level:.2g}", margins == level) for level in levels]
    groups.append(("all", np.ones(len(margins), dtype=bool)))
    groups = [(name, mask) for name, mask in groups if mask.any()]
    for place, (name, mask) in enumerate(groups):
        share = wilson_interval(float(correct[mask].sum()), int(mask.sum()))
        ax.bar(place, share.estimate, width=0.62, color=BLUE if name == "all" else SKY)
        error = [[share.estimate - share.low], [share.high - share.estimate]]
        ax.errorbar(place, share.estimate, error, color=INK, capsize=4, linewidth=1.3)
        ax.annotate(f"{share.estimate:.0%}", (place, 0), (0, 6), textcoords="offset points", ha="center", weight="bold",
                    color="white" if name == "all" else ON_BAR)  # fmt: skip
    ax.axhline(model.length_baseline, color=ORANGE, linestyle="--", label=f"length alone: {model.length_baseline:.0%}")
    ax.legend(loc="upper left", fontsize=8.5)
    ax.set_xticks(range(len(groups)), [f"{name}\n{int(mask.sum())} pairs" for name, mask in groups])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(
        title="Held-out accuracy by margin of the preference",
        xlabel="margin",
        ylim=(0, 1.16),
        yticks=np.arange(0, 1.01, 0.2),
    )
    ax.grid(axis="x", visible=False)


def length_against_reward(evaluation: Evaluation) -> Figure:
    """Whether reward is bought by length: one point per answer, with the rank correlation per model."""
    models = list(evaluation.models)
    colour = colours(models)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4))
        axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
        for ax, name in zip(axes, models, strict=True):
            points = np.array([(s.length, s.reward) for s in evaluation.models[name] if s.reward is not None])
            ax.scatter(
                points[:, 0], points[:, 1], s=16, color=colour[name], alpha=0.6, linewidths=0,
                rasterized=len(points) > _MOST_POINTS,
            )  # fmt: skip
            ax.set(title=f"{label(name)}: {_rank_correlation(points)}", xlabel="tokens of the answer")
        axes[0].set_ylabel("reward")
        return figure


def scores_by_kl(looks: Sequence[Look]) -> Figure | None:
    """The reward and every scorer that training never uses, along the checkpoints; None with fewer than two looks."""
    if len(looks) < 2:
        return None
    scorers = list(looks[-1].scorers)
    advised = recommended(looks)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.2))
        axes = figure.subplots(1, 1 + len(scorers), squeeze=False)[0]
        for ax, scorer, colour in zip(axes, [None, *scorers], [ORANGE] + [BLUE] * len(scorers), strict=True):
            kept = [(look, list(look.values(scorer).values())) for look in looks if look.values(scorer)]
            means = [mean_interval(values) for _, values in kept]
            places = [look.kl for look, _ in kept]
            ax.fill_between(
                places, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.2, linewidth=0
            )
            ax.plot(places, [m.estimate for m in means], color=colour, marker="o", markersize=4)
            ax.axvline(advised.kl, color=INK, linestyle=":", linewidth=1)
            ax.set_title("Reward" if scorer is None else label(scorer))
            ax.set_xlabel("KL to the reference, nats per answer")
            ax.set_ylabel("mean")
    return figure


def _rank_correlation(points: np.ndarray) -> str:
    """Spearman's rho, where both coordinates vary."""

    if (points.std(axis=0) == 0).any():
        return "no variation"
    return f"rank correlation {spearmanr(points[:, 0], points[:, 1]).statistic:+.2f}"
