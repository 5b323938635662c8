"""Is the served model the trained one? The same prompts to both, and next-token distributions compared at places inside the answers.

A place is a prefix of a conversation that ends before a token of an answer. Tags of the format are left out, and so are places where the local
model gives one token more than 99 %, as long as 50 others remain: everybody is sure of these, so they tell models apart badly. The server is asked
for one token at each place and gives the log-probabilities of its k most probable ones; the local model gives all. What the server does not list is
one further event on both sides:

    kl_served  = sum_k q (log q - log p) + rest        q the server's, p the local probabilities: a lower bound of KL(served || local)
    kl_local   = sum_k p (log p - log q) + rest        likewise of KL(local || served)

Verdict: yes, if the mean of kl_served is at most 0.01 nats and both agree on the most probable token at 85 % of the places or more. The limits leave
room for what servers do to the same weights: llama.cpp rounds activations to 8 bits in its CPU kernels for MXFP4, which on a random model gave a mean
KL of 0.0016 and 92.5 % agreement. The largest 2 % of the values stay out of the mean: where two experts are nearly as good for a token, such rounding
picks the other one and changes that place altogether (nano: one place of 50 with 0.96 nats, the others together 0.006). llama.cpp also reads YaRN's
`truncate: false` as true; where that alone explains a "no", the reason says so.
Take conversations of the kind that the model was trained on: two models that answer alike within these limits cannot be told apart, a model quantized
after training among them. `others` makes the question sharper: the served model has to be nearer to the trained one than to any of them.

Legend: P places  V vocab  D hidden
"""

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from gptoss_jax.data.harmony import SPECIAL_TOKENS, Encoded, System, encode_conversations
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation.answers import STOP_TOKENS
from gptoss_jax.evaluation.compare import states
from gptoss_jax.evaluation.endpoint import Endpoint
from gptoss_jax.evaluation.subjects import LocalSubject, Report
from gptoss_jax.model import compute_logits

MAX_KL, MIN_TOP1, MIN_PLACES = 0.01, 0.85, 50
BLOCK = 128  # places whose logits exist at a time: 128 x 201,088 float32 are 103 MB
OUTLIERS = 0.02  # share of places that the mean leaves out
CERTAIN = 0.99  # probability of one token from which on a place is of little use


@dataclass(frozen=True)
class ServedComparison:
    """One value per place. `target_difference` is log q - log p of the token of the conversation, NaN where the server does not list it."""

    kl_served: np.ndarray  # float64 [P]
    kl_local: np.ndarray  # float64 [P]
    same_top: np.ndarray  # bool [P]
    covered: np.ndarray  # float64 [P], what the listed tokens weigh in the server's distribution
    target_difference: np.ndarray  # float64 [P]
    max_kl: float = MAX_KL
    min_top1: float = MIN_TOP1
    others: Mapping[str, float] = field(default_factory=dict)  # name of another model -> mean KL(served || other) at the same places
    kl_truncated: float | None = None  # mean kl_served of the local model read as llama.cpp reads it, where that differs

    def reasons(self) -> list[str]:
        """Why the answer is no; empty where it is yes."""
        kl, top1 = trimmed_mean(self.kl_served), self.same_top.mean()
        truncated = "" if self.kl_truncated is None else f" ({self.kl_truncated:.4g} with YaRN's `truncate: false` read as true, as llama.cpp does)"
        checks = (
            (len(self.kl_served) >= MIN_PLACES, f"only {len(self.kl_served)} places were compared, fewer than {MIN_PLACES}"),
            (kl <= self.max_kl, f"mean KL(served || local) is {kl:.4g}, above {self.max_kl:g}{truncated}"),
            (top1 >= self.min_top1, f"the most probable token is the same at {top1:.1%} of the places, below {self.min_top1:.0%}"),
        )
        nearer = [f"it is nearer to {name}: mean KL(served || {name}) is {other:.4g}" for name, other in self.others.items() if other <= kl]
        return [text for passed, text in checks if not passed] + nearer

    @property
    def same_model(self) -> bool:
        return not self.reasons()

    def to_dict(self) -> dict[str, Any]:
        listed = self.target_difference[~np.isnan(self.target_difference)]
        quantiles = (0.05, 0.25, 0.5, 0.75, 0.95)
        return {
            "verdict": "yes" if self.same_model else "no",
            "reasons": self.reasons(),
            "places": len(self.kl_served),
            "kl_served": trimmed_mean(self.kl_served),
            "kl_served_all_places": float(self.kl_served.mean()),
            "kl_served_truncated": self.kl_truncated,
            "kl_local": trimmed_mean(self.kl_local),
            "top1_agreement": float(self.same_top.mean()),
            "covered": float(self.covered.mean()),
            "logprob_difference": {f"{q:g}": float(v) for q, v in zip(quantiles, np.quantile(listed, quantiles))} if len(listed) else {},
            "others": dict(self.others),
            "limits": {"max_kl": self.max_kl, "min_top1": self.min_top1},
        }


def trimmed_mean(values: Iterable[float]) -> float:
    """The mean without the largest `OUTLIERS` of the values (rounded up, so one at least)."""
    values = np.sort(np.fromiter(values, np.float64))
    return float(values[: max(1, len(values) - math.ceil(OUTLIERS * len(values)))].mean())


def compare_served(
    subject: LocalSubject,
    endpoint: Endpoint,
    rows: Sequence[dict[str, Any]],
    *,
    others: Mapping[str, LocalSubject] | None = None,
    system: System | str | None = None,
    count: int = 256,
    top: int = 20,
    max_kl: float = MAX_KL,
    min_top1: float = MIN_TOP1,
    report: Report | None = None,
) -> ServedComparison:
    """The local model against the served one at `count` places of the conversations' answers.

    Raises:
      UsageError: the conversations have no answers.
      RunError: the server does not answer as it should.
    """
    documents = encode_conversations(rows, subject.tokenizer, system=system)
    candidates = content_places(documents, subject.tokenizer)
    if not candidates:
        raise UsageError("the conversations have no answer whose tokens could be compared")
    hidden_PD = _hidden_before(subject, documents, candidates)
    chosen = _uncertain_first(_largest(subject, hidden_PD), count)
    places = [candidates[i] for i in chosen]
    served = endpoint.next_token([documents[i].ids[:t] for i, t in places], top, report)
    targets = [int(documents[i].labels[t]) for i, t in places]
    results = [_distance(found, log_p_V, target) for found, log_p_V, target in zip(served, _log_probs(subject, hidden_PD[chosen]), targets)]

    def mean_kl(other: LocalSubject) -> float:
        log_probs = _log_probs(other, _hidden_before(other, documents, places))
        return trimmed_mean(_distance(found, log_p_V, 0)[0] for found, log_p_V in zip(served, log_probs))

    distances = {name: mean_kl(other) for name, other in (others or {}).items()}
    truncated = _truncated(subject) if endpoint.server == "llamacpp" else None
    return ServedComparison(*map(np.array, zip(*results)), max_kl, min_top1, distances, truncated and mean_kl(truncated))


def _truncated(subject: LocalSubject) -> LocalSubject | None:
    """The model with YaRN's correction range in whole dimensions; None where it is so already."""
    config = subject.model.config
    if config.rope.truncate:
        return None
    config = dataclasses.replace(config, rope=dataclasses.replace(config.rope, truncate=True))
    return subject.with_model(dataclasses.replace(subject.model, config=config))


def content_places(documents: Sequence[Encoded], tokenizer: Any) -> list[tuple[int, int]]:
    """(document, index) of every trained token that is neither a tag nor a channel's name. The end of an answer counts."""
    vocab = tokenizer.get_vocab()
    tags = np.array([vocab[name] for name in SPECIAL_TOKENS if name in vocab and name not in STOP_TOKENS])
    places = []
    for number, document in enumerate(documents):
        chosen = (document.weights > 0) & ~np.isin(document.ids, tags)
        chosen[1:] &= document.ids[:-1] != vocab["<|channel|>"]
        chosen[0] = False
        places += [(number, int(i)) for i in np.flatnonzero(chosen)]
    return places


def _uncertain_first(largest_P: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """At most `count` indices, ascending: a seeded random choice of places below `CERTAIN`, filled up to `MIN_PLACES` with others."""
    order = np.random.default_rng(seed).permutation(len(largest_P))
    order = order[np.argsort(largest_P[order] >= CERTAIN, kind="stable")]
    return np.sort(order[: min(count, max(MIN_PLACES, int((largest_P < CERTAIN).sum())))])


def _distance(found: dict[int, float], log_p_V: np.ndarray, target: int) -> tuple[float, float, bool, float, float]:
    """kl_served, kl_local, same_top, covered, target_difference of one place; `found` are the server's log-probabilities by token id."""
    ids = np.array([i for i in found if i < len(log_p_V)])
    log_q, log_p = np.array([found[int(i)] for i in ids]), log_p_V[ids].astype(np.float64)
    q, p = np.exp(log_q), np.exp(log_p)
    rest_q, rest_p = (max(1e-12, 1.0 - values.sum()) for values in (q, p))
    kl_served = float((q * (log_q - log_p)).sum() + rest_q * np.log(rest_q / rest_p))
    kl_local = float((p * (log_p - log_q)).sum() + rest_p * np.log(rest_p / rest_q))
    same_top = int(ids[log_q.argmax()]) == int(log_p_V.argmax())
    return kl_served, kl_local, same_top, float(q.sum()), found[target] - float(log_p_V[target]) if target in found else np.nan


def _hidden_before(subject: LocalSubject, documents: Sequence[Encoded], places: Sequence[tuple[int, int]]) -> np.ndarray:
    """[P, D]: final hidden states of the token before each place, in the subject's dtype."""
    evaluation_set = subject.pack(documents)
    packed, size = evaluation_set.packed, evaluation_set.batch_size
    rows, columns = np.array([(packed.row_of[i], packed.start_of[i] + t - 1) for i, t in places]).T
    out = np.zeros((len(places), subject.model.config.hidden_size), subject.dtype)
    for number, batch in enumerate(evaluation_set.batches()):
        here = rows // size == number
        if here.any():
            hidden_BTD = deque(states(subject, batch), maxlen=1)[0]
            out[here] = np.asarray(hidden_BTD)[rows[here] % size, columns[here]]
    return out


@jax.jit
def _block_log_probs(w_VD, hidden_PD):
    """float32 [P, V], the product in the dtype of the hidden states."""
    return jax.nn.log_softmax(compute_logits({"lm_head.weight": w_VD}, hidden_PD[None], hidden_PD.dtype)[0])


def _log_probs(subject: LocalSubject, hidden_PD: np.ndarray) -> Iterator[np.ndarray]:
    """float32 [V] of each place; logits exist for `BLOCK` places at a time."""
    for start in range(0, len(hidden_PD), BLOCK):
        block = hidden_PD[start : start + BLOCK]
        padded = np.pad(block, ((0, BLOCK - len(block)), (0, 0)))
        with subject.precision():
            yield from np.asarray(_block_log_probs(subject.model.params["lm_head.weight"], padded))[: len(block)]


def _largest(subject: LocalSubject, hidden_PD: np.ndarray) -> np.ndarray:
    """float [P]: probability of the most probable token at each place."""
    return np.exp([log_p_V.max() for log_p_V in _log_probs(subject, hidden_PD)])
