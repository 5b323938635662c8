"""The parts of `gpu_suite.py` that prove something: codec bytes, trained weights = exported weights, repeatability, kernels against float32.

Every part takes `smoke` (tiny shapes, any device) and returns plain values with `ok`.
"""

import tempfile
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.checkpoint import code_hashes, export_hf, load_params, verify_dir
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.formats import Mxfp4, Nvfp4
from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.model.config import SLIDING
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import init_state, make_capture_step, make_train_step
from scripts.bench.batches import random_batch
from scripts.bench.common import WORKLOADS
from tests.formats.inputs import BF16, bf16_beside_maxima, f32_at_thresholds, random_bits
from tests.support.params import lively_params

FORMATS = (
    Mxfp4("rceil"), Mxfp4("floor"), Mxfp4("even"), Mxfp4("mse"), Mxfp4(compat="modelopt"), Nvfp4("pow2"), Nvfp4("exact"),
    Mxfp4(element_round="sr"), Nvfp4(element_round="dither", scale_round="up"), Nvfp4(four_six="mse"),
)  # fmt: skip
KEY = np.array([1, 2], np.uint32)  # of those that round stochastically
MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)


def _raw(tree) -> list[np.ndarray]:
    """Leaves as bytes, so that NaN equals NaN and -0 differs from 0."""
    return [np.ascontiguousarray(np.asarray(leaf)).reshape(-1).view(np.uint8) for leaf in jax.tree.leaves(tree)]


def _differing(a, b) -> int:
    return sum(int(np.count_nonzero(x != y)) if x.shape == y.shape else max(x.size, y.size) for x, y in zip(_raw(a), _raw(b), strict=True))


# one kind of layer, so that a single body compiles
TINY = GptOssConfig(
    vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, sliding_window=8, layer_types=(SLIDING, SLIDING),
)  # fmt: skip


# ---- codec ----------------------------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2)
def codec_inputs(block: int, smoke: bool) -> dict[str, np.ndarray]:
    """Arrays of blocks; those that are about NVFP4's global scale have three dimensions, one matrix per case."""
    every = np.arange(2**16, dtype=np.uint16).view(BF16).reshape(-1, block)
    maxima = np.concatenate([np.ldexp(np.float32(m), np.arange(-126, 127)) for m in (1.0, 1.5, 1.75)]).astype(np.float32)
    # every element midpoint at each of the scales that a maximum may get
    scale = np.ldexp(np.float32(1), np.maximum(np.frexp(maxima)[1] - 3, -126))[:, None]
    with np.errstate(over="ignore"):
        beside = np.concatenate([scale * MIDPOINTS[::2], 2 * scale * MIDPOINTS[1::2]], axis=1).astype(np.float32)[:, : (block - 2) // 3]
    beside[~np.isfinite(beside)] = 0
    blocks = 2**8 if smoke else 2**20
    gauss = np.random.default_rng(1).standard_normal((blocks, block), np.float32) * np.float32(0.02)
    found = {
        "all bfloat16": every,
        "bfloat16 beside maxima": bf16_beside_maxima(block, mantissas=(64, 65) if smoke else (0, 42, 43, 64, 65, 95, 96, 127)),
        "float32 beside borders": f32_at_thresholds(maxima, beside, block)[:, None],
        "float32 of all exponents": random_bits((blocks, block), seed=1),
        "float32 gaussian": gauss,
    }
    if smoke:
        found = {name: x[:: max(1, len(x) // 512)] for name, x in found.items()}
    return found


def codec(smoke: bool) -> dict:
    """Bytes and decoded values on this device, compiled and op by op, against the CPU's, compiled."""
    cpu = jax.devices("cpu")[0]
    rows, total = [], 0
    formats = FORMATS[::5] if smoke else FORMATS
    for fmt in formats:
        key = KEY if fmt.stochastic else None
        run = jax.jit(lambda x, fmt=fmt, key=key: fmt.encode_decode(x, jnp.bfloat16, key))
        decode = jax.jit(lambda q, fmt=fmt: fmt.decode(q, jnp.float32))
        for name, x in codec_inputs(fmt.block_size, smoke).items():
            expected = jax.tree.map(np.asarray, run(jax.device_put(x, cpu)))
            expected_decoded = np.asarray(decode(jax.device_put(expected[1], cpu)))
            here = jnp.asarray(x)
            codes = jax.tree.map(jnp.asarray, expected[1])
            bad = {"compiled": _differing(run(here), expected), "decoded": _differing(decode(codes), expected_decoded)}
            if not smoke and x.size <= 2**23:
                with jax.disable_jit():
                    bad["op by op"] = _differing(fmt.encode_decode(here, jnp.bfloat16, key), expected)
            total += sum(bad.values())
            rows.append({"format": str(fmt), "input": name, "elements": x.size, "differing_bytes": bad})
    return {"ok": total == 0, "reference": "cpu, compiled", "rows": rows}


# ---- training = export ------------------------------------------------------------------------------------------------------------------
def trained_is_exported(smoke: bool) -> dict:
    """QAT steps of gpt-oss-nano on this device; exported with the CPU's codec; decoded on the CPU: equal to what the compiled step consumed."""
    cpu = jax.devices("cpu")[0]
    config, params = load_params(NANO, jnp.float32)
    rows, length, steps = (2, 32, 1) if smoke else (8, 256, 5)
    batch = random_batch(config.vocab_size, rows, length)
    found = {}
    for fmt in (Mxfp4(),) if smoke else (Mxfp4(), Nvfp4()):
        train = parse({"steps": steps, "batch": {"rows": rows}, "compute_dtype": "bfloat16", "optimizer": {"learning_rate": 1e-3}})
        quant = make_expert_quant(default_policy(fmt), jnp.bfloat16)
        state = init_state(config, train, params)
        step = make_train_step(config, train, quant)
        for _ in range(steps):
            state, metrics = step(state, batch)
        captured = jax.tree.map(np.asarray, make_capture_step(config, train, quant)(state, batch))
        masters = {name: np.asarray(value) for name, value in state.params.items()}
        moved = float(np.mean([np.mean(masters[name] != np.asarray(params[name])) for name in captured.weights]))
        with tempfile.TemporaryDirectory() as directory, jax.default_device(cpu):
            out = export_hf(f"{directory}/out", config, masters, format=fmt)
            report = verify_dir(out, against=code_hashes(config, captured.codes))
            here = {name: jax.sharding.SingleDeviceSharding(cpu) for name in abstract_params(config)}
            _, exported = load_params(out, jnp.float32, here)
            bad = sum(_differing(exported[name], np.asarray(value, np.float32)) for name, value in captured.weights.items())
        found[fmt.name] = {"differing_bytes": bad, "masters_moved": moved, "verified": report.ok, "loss": float(metrics["loss"])}
    return {"ok": all(f["differing_bytes"] == 0 and f["verified"] and f["masters_moved"] > 0.5 for f in found.values()), **found}


# ---- repeatability ----------------------------------------------------------------------------------------------------------------------
def repeatable(smoke: bool) -> dict:
    """One QAT step twice from the same state: every bit of parameters, moments and metrics."""
    config = TINY if smoke else WORKLOADS["112m"].config
    rows, length = (1, 16) if smoke else (8, 1024)
    train = parse({"steps": 10, "batch": {"rows": rows}, "compute_dtype": "bfloat16", "quant": {"format": "mxfp4"}})
    step = make_train_step(config, train, make_expert_quant(default_policy("mxfp4"), jnp.bfloat16))
    params = lively_params(config)
    batch = random_batch(config.vocab_size, rows, length)
    first, second = (jax.tree.map(np.asarray, step(init_state(config, train, params), batch)) for _ in range(2))
    return {"ok": _differing(first, second) == 0, "differing_bytes": _differing(first, second), "loss": float(first[1]["loss"])}


# ---- kernels ----------------------------------------------------------------------------------------------------------------------------
def kernels(smoke: bool) -> dict:
    """Every backend in bfloat16 and float32 against dense float32 references: values and gradients, largest error over largest magnitude.

    In bfloat16, kernels may err at most 1.5 times as much as plain XLA does.
    """
    from gptoss_jax.ops.attention import attention
    from gptoss_jax.ops.attention.reference import attention_reference
    from gptoss_jax.ops.experts import expert_mlp

    backends = ("xla",) if smoke else ("xla", "triton")
    rows, length, window = (1, 40, 8) if smoke else (2, 1024, 128)
    hidden, width, experts, heads, kv_heads, head_dim = (32, 64, 4, 4, 2, 8) if smoke else (2880, 2880, 8, 64, 8, 64)
    key = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape, scale=1.0: scale * jax.random.normal(next(key), shape)
    segments = jnp.broadcast_to(1 + (jnp.arange(length) > length // 3), (rows, length)).astype(jnp.int32)
    qkvs = normal(rows, length, heads, head_dim), normal(rows, length, kv_heads, head_dim), normal(rows, length, kv_heads, head_dim), normal(heads)
    choice_SA = jnp.argsort(jax.random.uniform(next(key), (rows * length, experts)), axis=1)[:, :2].astype(jnp.int32)
    moe = (
        normal(rows * length, hidden), jax.random.uniform(next(key), choice_SA.shape), normal(experts, 2 * width, hidden, scale=hidden**-0.5),
        normal(experts, 2 * width, scale=0.1), normal(experts, hidden, width, scale=width**-0.5), normal(experts, hidden, scale=0.1),
    )  # fmt: skip

    def attend(window):
        return lambda backend: lambda q, k, v, s: attention(q, k, v, s, segments, window, backend=backend)

    def experts_of(backend):
        return lambda x, p, *w: expert_mlp(x, choice_SA, p, *w, limit=7.0, backend=backend)

    def experts_dense(x, p, up, b_up, down, b_down):
        share_SE = jnp.sum(jax.nn.one_hot(choice_SA, experts) * p[..., None], axis=1)
        h = jnp.einsum("sd,eud->seu", x, up) + b_up
        gate, linear = jnp.minimum(h[..., ::2], 7.0), jnp.clip(h[..., 1::2], -7.0, 7.0)
        y = jnp.einsum("sef,edf->sed", gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1), down) + b_down
        return jnp.einsum("sed,se->sd", y, share_SE)

    cases = {
        "attention, full": (attend(None), lambda *a: attention_reference(*a, segments, None), qkvs),
        "attention, sliding": (attend(window), lambda *a: attention_reference(*a, segments, window), qkvs),
        "experts": (experts_of, experts_dense, moe),
    }

    def value_and_gradients(function, arguments):
        cotangent = jnp.cos(jnp.arange(np.prod(jax.eval_shape(function, *arguments).shape))).reshape(jax.eval_shape(function, *arguments).shape)
        run = jax.jit(lambda *a: (lambda y, pull: (y, pull(cotangent.astype(y.dtype))))(*jax.vjp(function, *a)))
        return [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(run(*arguments))]

    rows_, ok = [], True
    for name, (make, reference, arguments) in cases.items():
        with jax.default_matmul_precision("highest"):
            expected = value_and_gradients(reference, arguments)
        errors = {}
        for dtype in (jnp.float32, jnp.bfloat16):
            for backend in backends:
                label = f"{backend} {jnp.dtype(dtype).name}"
                try:
                    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
                        got = value_and_gradients(make(backend), tuple(a.astype(dtype) for a in arguments))
                    errors[label] = [float(f"{np.abs(g - e).max() / np.abs(e).max():.2e}") for g, e in zip(got, expected, strict=True)]
                except Exception as error:  # another kernel may still work
                    errors[label] = f"{type(error).__name__}: {str(error)[:300]}"
        plain = errors["xla bfloat16"]
        for label, found in errors.items():
            bound = [1e-4] * len(expected) if "float32" in label else [1.5 * e for e in plain] if isinstance(plain, list) else []
            ok &= isinstance(found, list) and all(e <= b for e, b in zip(found, bound, strict=True))
        rows_.append({"op": name, "errors of value and gradients": errors})
    return {"ok": bool(ok), "rows": rows_}

