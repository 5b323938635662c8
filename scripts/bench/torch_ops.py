"""torch's side of `ops.py`: grouped_mm, transformers' experts and eager attention, F.cross_entropy. A worker process.

The loss of an operation is half the sum of squares of its result, in float32, so that its gradient is the result itself.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import GptOssConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, eager_attention_forward

sys.path.insert(0, str(Path(__file__).resolve().parent))
from op_cases import SIZES, Sizes, inputs, useful_flops
from turns import least_seconds, serve

THREADS = 2


def half_square(y):
    return 0.5 * y.float().square().sum()


def grouped(a: dict, z: Sizes, backward: bool):
    """Rows sorted beforehand: only the products are timed, as on the other side."""
    order = torch.argsort(a["experts_SA"].reshape(-1), stable=True)
    x = a["x_SD"].detach()[order // z.per_token].contiguous().requires_grad_(backward)
    w = a["w_up_EUD"].detach().transpose(1, 2).contiguous().requires_grad_(backward)
    ends = torch.bincount(a["experts_SA"].reshape(-1), minlength=z.experts).cumsum(0).to(torch.int32)
    multiply = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return lambda: multiply(x, w, offs=ends), [x, w]


def experts(a: dict, z: Sizes, implementation: str):
    config = GptOssConfig(hidden_size=z.hidden, intermediate_size=z.width, num_local_experts=z.experts, num_experts_per_tok=z.per_token)
    config._experts_implementation = implementation
    layer = GptOssExperts(config).to(a["x_SD"].dtype)
    with torch.no_grad():
        layer.gate_up_proj.copy_(a["w_up_EUD"].transpose(1, 2))
        layer.down_proj.copy_(a["w_down_EDF"].transpose(1, 2))
        layer.gate_up_proj_bias.copy_(a["bias_up_EU"])
        layer.down_proj_bias.copy_(a["bias_down_ED"])
    index, weights = a["experts_SA"].long(), a["weights_SA"]
    run = layer.forward if implementation == "eager" else lambda *args: grouped_mm_experts_forward(layer, *args)
    return lambda: run(a["x_SD"], index, weights), [a["x_SD"], weights, *layer.parameters()]


def attention(a: dict, z: Sizes, window: int | None, sinks: bool):
    heads_first = {name: a[name].detach().transpose(1, 2).contiguous().requires_grad_() for name in ("q_BTNH", "k_BTKH", "v_BTKH")}
    q, k, v = heads_first.values()
    if not sinks:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), [q, k, v]
    age = torch.arange(z.length)[:, None] - torch.arange(z.length)
    hidden = (age < 0) | (age >= (window or z.length))
    mask = torch.zeros(z.length, z.length, dtype=q.dtype).masked_fill(hidden, torch.finfo(q.dtype).min)[None, None]
    module = SimpleNamespace(num_key_value_groups=z.heads // z.kv_heads, sinks=a["sinks_N"], training=True)
    return lambda: eager_attention_forward(module, q, k, v, mask, z.head_dim**-0.5)[0], [q, k, v, a["sinks_N"]]


def make(op: str, variant: str, z: Sizes, dtype: torch.dtype):
    """(function of no arguments returning a scalar loss or a result, what its gradients are taken of)."""
    a = {name: torch.from_numpy(value) for name, value in inputs(op, z).items()}
    a = {name: value.to(dtype).requires_grad_() if value.is_floating_point() else value for name, value in a.items()}
    kind, backward = op.split(",")[0], op.endswith("backward")
    if kind == "cross-entropy":
        targets = a["targets_S"].long()
        return (lambda: F.cross_entropy((a["hidden_SD"] @ a["w_VD"].T).float(), targets, reduction="sum")), [a["hidden_SD"], a["w_VD"]]
    if kind == "grouped matmul":
        run, leaves = grouped(a, z, backward)
    elif kind == "expert layer":
        run, leaves = experts(a, z, variant)
    else:
        run, leaves = attention(a, z, z.window if kind.startswith("sliding") else None, variant != "sdpa without sinks")
    return (lambda: half_square(run())) if backward else run, leaves


VARIANTS = {
    "expert layer, forward and backward": ("grouped_mm", "eager"),
    "full attention, forward and backward": ("eager with sinks", "sdpa without sinks"),
}


def answer(op: str, size: str, dtype: str, repeats: int, variant: str = "", dense: int = 2048) -> dict:
    """Seconds and value of an operation; `op` "dense" is the rate of a square product in FLOP/s, "variants" the implementations there are."""
    torch.set_num_threads(THREADS)
    kind = getattr(torch, dtype)
    if op == "dense":
        a = torch.ones(dense, dense, dtype=kind)
        return {"flops_per_s": 2 * dense**3 / least_seconds(lambda: a @ a, repeats)}
    run, leaves = make(op, variant, SIZES[size], kind)
    if not op.endswith("backward"):
        with torch.no_grad():
            return {"seconds": least_seconds(run, repeats), "value": float(half_square(run()))}
    value = run().item()
    return {"seconds": least_seconds(lambda: torch.autograd.grad(run(), leaves), repeats), "value": value, "flops": useful_flops(op, SIZES[size])}


if __name__ == "__main__":
    serve(answer)
