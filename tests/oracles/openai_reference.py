"""The arithmetic of OpenAI's published PyTorch reference (openai/gpt-oss, gpt_oss/torch/model.py and weights.py) in NumPy, on the files of its own
layout: an oracle for what an export in that layout computes. Float64 throughout; one sequence, no cache, no batching.

Legend: T tokens  D hidden  N query heads  K kv heads  H head dim  E experts  A experts per token  F expert hidden
"""

import json
import math
from pathlib import Path

import ml_dtypes  # noqa: F401  (numpy then knows bfloat16, which safetensors asks it for)
import numpy as np
from safetensors.numpy import load_file

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ALPHA = 1.702
EPS = 1e-5


class Reference:
    """A directory of OpenAI's original layout, opened as the reference opens it: all *.safetensors, config.json without a key too many."""

    def __init__(self, directory: Path):
        self.config = json.loads((directory / "config.json").read_text())
        known = {
            "num_hidden_layers", "num_experts", "experts_per_token", "vocab_size", "hidden_size", "intermediate_size", "swiglu_limit", "head_dim",
            "num_attention_heads", "num_key_value_heads", "sliding_window", "initial_context_length", "rope_theta", "rope_scaling_factor",
            "rope_ntk_alpha", "rope_ntk_beta",
        }  # fmt: skip
        assert set(self.config) == known
        self.tensors = {}
        for file in directory.glob("*.safetensors"):
            self.tensors |= load_file(file)

    def get(self, name: str) -> np.ndarray:
        """A tensor in float64; of MXFP4 the decoded matrix."""
        if name in self.tensors:
            return self.tensors[name].astype(np.float64)
        blocks, scales = self.tensors[f"{name}.blocks"], self.tensors[f"{name}.scales"]
        assert blocks.shape[:-1] == scales.shape
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
        return np.ldexp(GRID[codes], scales[..., None].astype(np.int32) - 127).reshape(*scales.shape[:-1], -1)

    def logits(self, tokens_T: np.ndarray) -> np.ndarray:
        """[T, vocabulary]."""
        x_TD = self.get("embedding.weight")[tokens_T]
        for layer in range(self.config["num_hidden_layers"]):
            x_TD = x_TD + self._attention(f"block.{layer}.attn.", x_TD, slides=layer % 2 == 0)
            x_TD = x_TD + self._experts(f"block.{layer}.mlp.", x_TD)
        return self._norm("norm.scale", x_TD) @ self.get("unembedding.weight").T

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * self.get(name)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.get(f"{name}.weight").T + self.get(f"{name}.bias")

    def _attention(self, at: str, x_TD: np.ndarray, slides: bool) -> np.ndarray:
        c, T = self.config, len(x_TD)
        N, K, H = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        fused = self._linear(f"{at}qkv", self._norm(f"{at}norm.scale", x_TD))
        q, k, v = np.split(fused, [N * H, (N + K) * H], axis=-1)
        q_TNH, k_TKH = self._rotated(q.reshape(T, N, H)), self._rotated(k.reshape(T, K, H))
        k_TNH, v_TNH = (np.repeat(a.reshape(T, K, H), N // K, axis=1) for a in (k_TKH, v))
        scores = np.einsum("qnh,knh->nqk", q_TNH, k_TNH) / math.sqrt(H)
        distance = np.arange(T)[:, None] - np.arange(T)[None, :]
        hidden = (distance < 0) | (slides & (distance >= c["sliding_window"]))
        scores = np.where(hidden, -np.inf, scores)
        sinks = np.broadcast_to(self.get(f"{at}sinks")[:, None, None], (N, T, 1))
        scores = np.concatenate([scores, sinks], axis=-1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = (weights / weights.sum(-1, keepdims=True))[..., :-1]
        return self._linear(f"{at}out", np.einsum("nqk,knh->qnh", weights, v_TNH).reshape(T, N * H))

    def _rotated(self, x_TNH: np.ndarray) -> np.ndarray:
        """YaRN: interpolated below, extrapolated above, a ramp that is not rounded to whole dimensions between."""
        c, half = self.config, x_TNH.shape[-1] // 2
        base, factor = c["rope_theta"], c["rope_scaling_factor"]
        frequency = base ** (np.arange(half) / half)
        border = lambda rotations: half * math.log(c["initial_context_length"] / (rotations * 2 * math.pi)) / math.log(base)
        low, high = border(c["rope_ntk_beta"]), border(c["rope_ntk_alpha"])
        assert 0 < low < high < half - 1  # as the reference does
        extrapolated = 1 - np.clip((np.arange(half) - low) / (high - low), 0, 1)
        inverse = (1 - extrapolated) / (factor * frequency) + extrapolated / frequency
        concentration = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        angle = np.arange(len(x_TNH))[:, None, None] * inverse
        cos, sin = np.cos(angle) * concentration, np.sin(angle) * concentration
        first, second = x_TNH[..., :half], x_TNH[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def _experts(self, at: str, x_TD: np.ndarray) -> np.ndarray:
        t_TD = self._norm(f"{at}norm.scale", x_TD)
        logits_TE = self._linear(f"{at}gate", t_TD)
        chosen_TA = np.argsort(-logits_TE, axis=-1, kind="stable")[:, : self.config["experts_per_token"]]
        picked = np.take_along_axis(logits_TE, chosen_TA, axis=-1)
        weights_TA = np.exp(picked - picked.max(-1, keepdims=True))
        weights_TA /= weights_TA.sum(-1, keepdims=True)
        w1, b1, w2, b2 = (self.get(at + name) for name in ("mlp1_weight", "mlp1_bias", "mlp2_weight", "mlp2_bias"))
        out, limit = np.zeros_like(x_TD), self.config["swiglu_limit"]
        for token, (experts, weights) in enumerate(zip(chosen_TA, weights_TA, strict=True)):
            for e, weight in zip(experts, weights, strict=True):
                h = w1[e] @ t_TD[token] + b1[e]
                gate, linear = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
                out[token] += weight * (w2[e] @ (gate / (1 + np.exp(-ALPHA * gate)) * (linear + 1)) + b2[e])
        return out
