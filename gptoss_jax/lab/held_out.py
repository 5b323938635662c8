"""The conversations that experiments are measured on, and what is measured of a set of deployed weights.

`dev` is the development set of the nano tasks. `fresh` is drawn from the questions of the `final` split (numbers and verb-object pairs that no
training row has) without those that were published or looked at before: the first `final` set and the one that comes with the package. Its seed was
fixed here before anything was measured on it.

A row passes if greedy decoding would give its reference word for word, which one forward pass decides (`evaluation/pass_rate.py`).
"""

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gptoss_jax.checkpoint.compare import expert_keys
from gptoss_jax.checkpoint.hf_layout import pieces_of
from gptoss_jax.checkpoint.models import Model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_rows
from gptoss_jax.evaluation import LocalSubject, score
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.evaluation.tasks import task_rows
from gptoss_jax.formats import Format
from gptoss_jax.lab.quantizer import FakeQuant, Quantizer, expert_names, to_nearest
from gptoss_jax.model import GptOssConfig

FRESH_SEED = 20251125
FIRST_FINAL = {"A": 500, "B": 500, "H": 200, "Eng": 200}  # rows of the first published set, whose seed is 0
EVERY = 8  # rows of the curve


def evaluation_rows(name: str, counts: Mapping[str, int]) -> list[dict[str, Any]]:
    """`counts` rows per task of the set `dev` or `fresh`. UsageError where a task has no more questions."""
    if name == "dev":
        return [row for task, n in counts.items() for row in task_rows(task, "dev", 0, n)]
    seen = {_question(row) for row in load_rows(NANO / "tasks" / "final.jsonl").rows}
    seen |= {_question(row) for task, n in FIRST_FINAL.items() for row in task_rows(task, "final", 0, n)}
    rows = []
    for task, n in counts.items():
        drawn = task_rows(task, "final", FRESH_SEED, n + 2 * FIRST_FINAL[task])
        rows += [row for row in drawn if _question(row) not in seen][:n]
    return rows


def _question(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(message["content"] for message in row["messages"][:-1])


def deployed_format(quantizer: Quantizer, export: str | Format) -> Format | None:
    """The format that chooses the scales of the deployed experts; None where none does, or they are learned."""
    if export == "same":
        return quantizer.format if isinstance(quantizer, FakeQuant) else None
    return None if export == "bf16" else export


def deployed(
    config: GptOssConfig, params: Mapping[str, Array], extra: Mapping[str, Array], quantizer: Quantizer, export: str | Format
) -> dict[str, Array]:
    """Weights as an exported file holds them, in float32: experts in the format, all else rounded to bfloat16. Random rounding draws the bits that
    `checkpoint.export_hf` draws.

    Args:
      export: "same": the quantizer's own rounding, "bf16": masters rounded to bfloat16, or a format that the masters are encoded in.
    """
    if export == "same":
        made = quantizer.round(params, extra)
    elif export == "bf16":
        made = dict(params)
    else:
        made = {**params, **{name: _exported(config, name, params[name], export) for name in expert_names(params)}}
    return {name: weight.astype(jnp.bfloat16).astype(jnp.float32) for name, weight in made.items()}


def _exported(config: GptOssConfig, name: str, w: Array, fmt: Format) -> Array:
    """Decoded codes of a stacked parameter."""
    keys = None
    if fmt.stochastic:
        pieces = pieces_of(config, name, w.shape)
        keys = jnp.asarray(np.stack([expert_keys(fmt, piece, 0, piece.shape[0]) for piece in pieces]).reshape(*w.shape[:-2], 2))
    return fmt.encode_decode(w, jnp.float32, keys)[0]


class HeldOut:
    """Rows of a set, packed once; what a model says about them.

    Args:
      model: architecture and tokenizer; its weights are not used.
    """

    def __init__(self, model: Model, tokenizer: Any, name: str, counts: Mapping[str, int]):
        self.rows, self.subject = evaluation_rows(name, counts), LocalSubject(model, tokenizer, jnp.float32, numerics="bf16")
        self.tasks = list(counts)
        self.predict = make_predict(model.config, self.subject.dtype, self.subject.expert_quant)

    @cached_property
    def whole(self):
        return self.subject.evaluation_set(self.rows)

    @cached_property
    def some(self):
        return self.subject.evaluation_set(self.rows[::EVERY])

    def loss(self, params: Mapping[str, Array]) -> float:
        """Nats per trained token on every eighth row."""
        return score(self.predict(params), self.some).mean_loss()

    def measure(self, params: Mapping[str, Array]) -> dict[str, Any]:
        """`pass`: [passed, total] per task; `loss`: nats per trained token, of all rows and per task."""
        scores = score(self.predict(params), self.whole)
        parts = {task: scores.select(task=task) for task in self.tasks}
        return {
            "pass": {task: [int(part.passed.sum()), len(part.rows)] for task, part in parts.items()},
            "loss": scores.mean_loss(),
            "task_loss": {task: part.mean_loss() for task, part in parts.items()},
        }


def rounding_of(
    masters: Mapping[str, Array], made: Mapping[str, Array], base: Mapping[str, Array], fmt: Format | None = None
) -> dict[str, float]:
    """What deployment does to the experts beside what training did to them, over all expert weights (`training/diagnose/weights.py`): with
    delta = w - base and error = deployed - w

    error_ratio |error| / |delta|     pull_back  cosine of error and -delta     kept  <deployed - base, delta> / |delta|^2
    changed     share of weights with deployed != base
    scales_changed   share of blocks whose scale is not the base's, where a format chooses scales; under rceil a base on its grid has a scale doubled
                     as soon as a block's largest weight grows at all
    """
    names = expert_names(masters)
    sums = np.sum([np.asarray(_sums(masters[n], made[n], base[n]), np.float64) for n in names], axis=0)
    changed, delta2, error2, product = map(float, sums)
    size = sum(masters[n].size for n in names)
    found = {"changed": changed / size}
    if fmt is not None:
        flips = [np.asarray(_scale_flips(masters[n], base[n], to_nearest(fmt)), np.float64) for n in names]
        found["scales_changed"] = float(np.sum(flips) / (size / fmt.block_size))
    if not delta2:
        return found
    return {
        **found,
        "error_ratio": (error2 / delta2) ** 0.5,
        "pull_back": product / (delta2 * error2) ** 0.5 if error2 else 0.0,
        "kept": 1 - product / delta2,
    }


@jax.jit
def _sums(w, made, base):
    delta, error = w - base, made - w
    return jnp.stack([jnp.sum(made != base, dtype=jnp.float32), jnp.sum(delta * delta), jnp.sum(error * error), -jnp.sum(error * delta)])


@partial(jax.jit, static_argnums=2)
def _scale_flips(w, base, fmt: Format):
    scales = (fmt.parts(fmt.encode(x)).scale for x in (w, base))
    return jnp.sum(next(scales) != next(scales), dtype=jnp.float32)
