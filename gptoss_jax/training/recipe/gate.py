"""May a quantized export be shipped? Limits on what the recipe measured; a row that breaks one is taken out of `export/`.

    gate:
      min_pass: {language: 0.95}        # pass rate of a task, as a share
      max_drop: {language: 0.02}        # below the same seed's SFT BF16 row; one number stands for every task
      max_loss_increase: 0.01           # held-out loss above that of the SFT BF16 row, nats per token
      guard: guard.jsonl                # conversations that training should leave alone
      max_kl: 0.1                       # mean KL from the original on them, nats per token

A number that is not finite breaks its limit. Rates are compared as measured, without their intervals: a limit close to a rate needs many rows.
"""

from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

from pydantic import Field, model_validator

from gptoss_jax.errors import RunError
from gptoss_jax.training.config import Ratio, Section
from gptoss_jax.training.recipe.results import Measured
from gptoss_jax.training.recipe.rows import QAT_ROWS, RowName

GATE = "gate.json"
NonNegative = Annotated[float, Field(ge=0)]


class GateFailed(RunError):
    """Rows that may not be shipped; everything has been measured and written."""


class GateConfig(Section):
    # which rows must pass; those of them that the recipe makes
    rows: tuple[RowName, ...] = QAT_ROWS
    min_pass: dict[str, Ratio] = Field(default_factory=dict)
    max_drop: dict[str, Ratio] | Ratio | None = None
    max_loss_increase: NonNegative | None = None
    guard: str | None = None
    max_kl: NonNegative | None = None

    @model_validator(mode="after")
    def _complete(self):
        if (self.guard is None) != (self.max_kl is None):
            raise ValueError("guard and max_kl belong together")
        if not self.min_pass and self.max_drop is None and self.max_loss_increase is None and self.max_kl is None:
            raise ValueError("no limit is set: min_pass, max_drop, max_loss_increase or max_kl")
        return self

    @property
    def needs_reference(self) -> bool:
        return self.max_drop is not None or self.max_loss_increase is not None

    def drops(self, tasks: Iterable[str]) -> dict[str, float]:
        """Largest drop per task."""
        if self.max_drop is None:
            return {}
        return self.max_drop if isinstance(self.max_drop, dict) else dict.fromkeys(tasks, self.max_drop)

    def named_tasks(self) -> set[str]:
        return {*self.min_pass, *(self.max_drop if isinstance(self.max_drop, dict) else ())}


class Finding(NamedTuple):
    """One limit compared with one number. `task` where it is about one."""

    gate: str
    task: str | None
    value: float
    limit: float
    ok: bool

    def __str__(self) -> str:
        side = "below" if self.gate == "max_drop" else "above"
        distance = f"{abs(self.value):.4g} {side if self.value >= 0 else 'below' if side == 'above' else 'above'} the SFT BF16 row"
        what = {
            "min_pass": f"{self.value:.1%} of {self.task} pass, at least {self.limit:.1%} must",
            "max_drop": f"the pass rate of {self.task} is {distance}, at most {self.limit:.4g} below is allowed",
            "max_loss_increase": f"the loss is {distance}, at most {self.limit:.4g} above is allowed",
            "max_kl": f"KL to the original is {self.value:.4g} nats per token, at most {self.limit:.4g} is allowed",
        }[self.gate]
        return f"{self.gate}: {what}"


def judge(gate: GateConfig, measured: Measured, reference: Measured | None, tasks: Iterable[str]) -> list[Finding]:
    """Every limit of the gate against one row; `reference` is the SFT BF16 row of the same seed and variant."""
    findings = []
    for task, limit in gate.min_pass.items():
        rate = measured.rate(task)
        findings.append(Finding("min_pass", task, rate, limit, rate >= limit))
    for task, limit in gate.drops(tasks).items():
        drop = reference.rate(task) - measured.rate(task)
        findings.append(Finding("max_drop", task, drop, limit, drop <= limit + 1e-12))  # 1.0 - 0.95 is above 0.05
    if gate.max_loss_increase is not None:
        increase = measured.loss - reference.loss
        findings.append(Finding("max_loss_increase", None, increase, gate.max_loss_increase, increase <= gate.max_loss_increase))
    if gate.max_kl is not None:
        findings.append(Finding("max_kl", None, measured.kl, gate.max_kl, measured.kl <= gate.max_kl))
    return findings


def verdict(measured: Measured, findings: list[Finding], export: str) -> dict[str, Any]:
    """The record of one row in `gate.json`."""
    return {
        "row": measured.row, "variant": measured.variant, "seed": measured.seed, "export": export,
        "passed": all(finding.ok for finding in findings), "findings": [{**finding._asdict(), "text": str(finding)} for finding in findings],
    }  # fmt: skip
