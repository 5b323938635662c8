"""What a step says about routing: a few numbers per layer for metrics.jsonl, and the whole table of experts for router.jsonl.

    router/load_max   assignments of the busiest expert / mean over experts           1 even, E/A all tokens to the same
    router/load_cv    standard deviation of the assignments / their mean              0 even
    router/entropy    entropy of the mean full softmax / log E                        1 even, 0 one expert
    router/dropped    routed rows that no device computed, all layers together        0: counted, not assumed

The first three are lists, one number per layer, over the tokens of the batch that are not padding.

Legend: L layers  E experts  A experts per token
"""

from typing import Any

import numpy as np

from gptoss_jax.model import RouterStats

DIGITS = 4


def _numbers(x: np.ndarray) -> list:
    """Nested lists; null for what is not finite, because JSON has no NaN."""
    return [_numbers(row) if np.ndim(row) else round(float(row), DIGITS) if np.isfinite(row) else None for row in x]


def router_numbers(stats: RouterStats) -> dict[str, Any]:
    """The four of the table above, from the statistics of a step on the host."""
    assignments_LE, probability_LE = (np.asarray(x, np.float64) for x in (stats.assignments_E, stats.probability_E))
    with np.errstate(divide="ignore", invalid="ignore"):  # a batch of padding alone has no load
        load_LE = assignments_LE / assignments_LE.mean(axis=1, keepdims=True)
        share_LE = probability_LE / probability_LE.sum(axis=1, keepdims=True)
        entropy_L = -np.sum(share_LE * np.log(np.where(share_LE == 0, 1, share_LE)), axis=1) / np.log(share_LE.shape[1])
    return {
        "router/load_max": _numbers(load_LE.max(axis=1)),
        "router/load_cv": _numbers(load_LE.std(axis=1)),
        "router/entropy": _numbers(entropy_L),
        "router/dropped": int(np.sum(stats.num_dropped)),
    }


def router_table(step: int, stats: RouterStats) -> dict[str, Any]:
    """A line of router.jsonl: assignments and mean probability of every expert of every layer, [L][E]."""
    tokens_L = np.asarray(stats.num_tokens, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_LE = np.asarray(stats.probability_E, np.float64) / tokens_L[:, None]
    return {
        "step": step,
        "tokens": int(tokens_L[0]),
        "assignments": np.asarray(stats.assignments_E).astype(int).tolist(),
        "probability": [[round(p, 6) if np.isfinite(p) else None for p in row] for row in mean_LE.tolist()],
    }
