"""The findings of a diagnosis as table, text, JSON and picture, and the rule by which they become a verdict."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from gptoss_jax.training.diagnose.gap import Gap
from gptoss_jax.training.diagnose.weights import Change, Changes, total

NEEDED_FROM = 0.05  # rise of the held-out loss, as a share of it
UNDONE_BELOW, KEPT_FROM = 0.5, 0.8  # share of fine-tuning that rounding leaves in place; between them weights alone do not tell
RULE = (
    f"Rule: needed where rounding raises the held-out loss by {NEEDED_FROM:.0%} or more; without it, likely needed where it keeps less than "
    f"{UNDONE_BELOW:.0%} of fine-tuning, likely not from {KEPT_FROM:.0%} on. Basis, MXFP4: gpt-oss-nano (3.6 M parameters) kept 23%, its loss rose "
    "15-fold, a task lost 20 points; three models of 2 M kept 32%, 23% and 86%, their losses rose by 20%, 24% and 1.4%, and they lost 4 to 15, "
    "4 to 7 and 0 points. No large model has been measured."
)


@dataclass(frozen=True)
class Diagnosis:
    """`gap` is None without held-out conversations. `trained_for`: the format under which the checkpoint was trained already, None for SFT."""

    checkpoint: str
    base: str
    format: str
    changes: Changes
    gap: Gap | None
    data: str | None
    trained_for: str | None

    @property
    def all(self) -> Change:
        return total(self.changes.values())

    @property
    def verdict(self) -> str:
        """"needed", "not needed", "likely needed", "likely not needed", "open", or "done" where training was for this format."""
        if self.trained_for == self.format:
            return "done"
        if self.gap is not None:
            return "needed" if not self.gap.relative < NEEDED_FROM else "not needed"
        kept = self.all.kept
        return "likely needed" if kept < UNDONE_BELOW else "likely not needed" if kept >= KEPT_FROM else "open"

    def describe(self) -> str:
        """The verdict in words, with its numbers and its rule."""
        what = {
            "open": "weights alone do not tell here whether quantization-aware training is needed: give held-out conversations with --data",
            "done": f"this checkpoint was trained for {self.trained_for}: what is deployed are its rounded weights, not these masters",
        }
        lines = ["VERDICT: " + what.get(self.verdict, f"quantization-aware training is {self.verdict}") + "."]
        change, gap = self.all, self.gap
        lines.append(
            f"Fine-tuning changes {change.codes_changed:.1%} of the experts' {self.format.upper()} codes; rounding keeps {change.kept:.0%} of it "
            f"(pull-back {change.pull_back:.2f}, error/delta {change.error_ratio:.2f})."
        )
        if gap is not None:
            rise = f"x {gap.rounded / gap.loss:.1f}" if gap.relative > 1 else f"{gap.relative:+.1%}"
            worst = max(range(len(gap.per_layer)), key=lambda layer: gap.per_layer[layer])
            lines.append(
                f"Held-out loss ({gap.num_conversations} conversations of {self.data}): {gap.loss:.4g}, rounded {gap.rounded:.4g} ({rise}); most for "
                f"layer {worst} alone: {gap.per_layer[worst]:.4g}. Answers exactly right: {gap.exact:.1%}, rounded {gap.exact_rounded:.1%}."
            )
        return "\n".join([*lines, RULE])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "checkpoint": self.checkpoint, "base": self.base, "format": self.format, "verdict": self.verdict, "all": self.all.to_dict(),
            "matrices": [{"layer": layer, "projection": name, **change.to_dict()} for (layer, name), change in self.changes.items()],
            "data": self.data, "gap": asdict(self.gap) if self.gap else None, "trained_for": self.trained_for, "rule": RULE,
        }  # fmt: skip

    def layers(self) -> list[tuple[int, Change]]:
        """Both projections of each layer together."""
        layers = sorted({layer for layer, _ in self.changes})
        return [(layer, total(change for (number, _), change in self.changes.items() if number == layer)) for layer in layers]

    def projections(self) -> list[tuple[str, Change]]:
        """All layers of each projection together."""
        names = dict.fromkeys(name for _, name in self.changes)
        return [(name, total(change for (_, part), change in self.changes.items() if part == name)) for name in names]


def table(found: Diagnosis) -> Table:
    """One line per layer, per projection, and in all."""
    out = Table(pad_edge=False)
    for title in ("", "codes changed", "pull-back", "error/delta", "kept", "loss if rounded"):
        out.add_column(title, justify="right" if title else "left")

    def line(name: str, change: Change, loss: str, end: bool = False) -> None:
        cells = [f"{change.codes_changed:.2%}", f"{change.pull_back:.3f}", f"{change.error_ratio:.2f}", f"{change.kept:.0%}", loss]
        out.add_row(Text(name), *cells, end_section=end)

    layers, projections = found.layers(), found.projections()
    for layer, change in layers:
        line(f"layer {layer}", change, f"{found.gap.per_layer[layer]:.4f}" if found.gap else "", layer == layers[-1][0])
    for name, change in projections:
        line(name, change, "", name == projections[-1][0])
    line("all", found.all, f"{found.gap.rounded:.4f} (now {found.gap.loss:.4f})" if found.gap else "")
    return out


def plot_layers(found: Diagnosis, file: str | Path) -> bool:
    """Per layer: what rounding keeps, and the loss with that layer alone rounded. False, and nothing written, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    layers = found.layers()
    figure = Figure(figsize=(4.2 * (1 + (found.gap is not None)), 3.2), layout="constrained")
    axes = figure.subplots(1, 1 + (found.gap is not None), squeeze=False)[0]
    numbers = [layer for layer, _ in layers]
    axes[0].plot(numbers, [100 * change.kept for _, change in layers], "o", color="#0072B2", label="kept by rounding")
    axes[0].plot(numbers, [100 * change.codes_changed for _, change in layers], "D", color="#D55E00", markersize=4, label="codes changed")
    axes[0].set_ylabel("% of fine-tuning, % of codes")
    axes[0].set_ylim(bottom=min(0, axes[0].get_ylim()[0]))
    if found.gap is not None:
        axes[1].plot(numbers, found.gap.per_layer, "o", color="#0072B2", label="this layer rounded")
        for value, style, label in ((found.gap.loss, ":", "as it is"), (found.gap.rounded, "--", "all rounded")):
            axes[1].axhline(value, linestyle=style, color="0.4", linewidth=1, label=label)
        axes[1].set_ylabel("held-out loss, nats per token")
    for axis in axes:
        axis.set_xlabel("layer")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(fontsize=8, frameon=False)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)
    return True
