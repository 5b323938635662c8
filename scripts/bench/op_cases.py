"""The operations that `ops.py` times, as shapes, inputs and useful operations. numpy only: both sides read it.

Legend: S tokens  D hidden  E experts  A experts per token  R=S*A routed rows  F expert hidden  B rows  T tokens of a row  N query heads  K kv heads
H head dim  V vocabulary
"""

from dataclasses import dataclass

import numpy as np

OPS = (
    "grouped matmul, forward", "grouped matmul, forward and backward", "expert layer, forward and backward",
    "full attention, forward and backward", "sliding attention, forward and backward", "cross-entropy, forward and backward",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    rows: int
    length: int
    hidden: int
    width: int
    experts: int
    per_token: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    vocab: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def routed(self) -> int:
        return self.tokens * self.per_token


SIZES = {
    "9m": Sizes(4, 512, 256, 256, 8, 4, 8, 2, 32, 128, 4096),
    "112m": Sizes(2, 1024, 512, 512, 32, 4, 8, 2, 64, 128, 8192),
    "tiny": Sizes(2, 32, 32, 32, 4, 2, 4, 2, 8, 8, 64),
}


def useful_flops(op: str, z: Sizes) -> int:
    """Two per multiply-add of the products that the operation defines; the backward pass of a product is two products."""
    passes = 3 if op.endswith("backward") else 1
    seen = z.window if op.startswith("sliding") else z.length
    pairs = seen * z.length - seen * (seen - 1) // 2
    multiply_adds = {
        "grouped matmul": z.routed * z.hidden * 2 * z.width,
        "expert layer": z.routed * z.hidden * 3 * z.width,
        "full attention": z.rows * pairs * z.heads * 2 * z.head_dim,
        "sliding attention": z.rows * pairs * z.heads * 2 * z.head_dim,
        "cross-entropy": z.tokens * z.hidden * z.vocab,
    }[op.split(",")[0]]
    return 2 * passes * multiply_adds


def inputs(op: str, z: Sizes) -> dict[str, np.ndarray]:
    """The same float32 and integer arrays on both sides. Weights are [out, in]."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, scale=1.0: (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(np.float32)
    kind = op.split(",")[0]
    if kind in ("grouped matmul", "expert layer"):
        choice_SA = np.argsort(rng.random((z.tokens, z.experts)), axis=1)[:, : z.per_token].astype(np.int32)
        w_up_EUD = normal(z.experts, 2 * z.width, z.hidden, scale=z.hidden**-0.5)
        found = {"x_SD": normal(z.tokens, z.hidden), "experts_SA": choice_SA, "w_up_EUD": w_up_EUD}
        if kind == "expert layer":
            weights_SA = rng.random((z.tokens, z.per_token), np.float32)
            found |= {
                "weights_SA": weights_SA / weights_SA.sum(axis=1, keepdims=True),
                "bias_up_EU": normal(z.experts, 2 * z.width, scale=0.1),
                "w_down_EDF": normal(z.experts, z.hidden, z.width, scale=z.width**-0.5),
                "bias_down_ED": normal(z.experts, z.hidden, scale=0.1),
            }
        return found
    if kind == "cross-entropy":
        return {"hidden_SD": normal(z.tokens, z.hidden), "w_VD": normal(z.vocab, z.hidden, scale=0.05),
                "targets_S": rng.integers(0, z.vocab, z.tokens).astype(np.int32)}  # fmt: skip
    return {"q_BTNH": normal(z.rows, z.length, z.heads, z.head_dim), "k_BTKH": normal(z.rows, z.length, z.kv_heads, z.head_dim),
            "v_BTKH": normal(z.rows, z.length, z.kv_heads, z.head_dim), "sinks_N": normal(z.heads)}  # fmt: skip
