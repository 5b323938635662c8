"""The parts of `gpu_suite.py` that time something: codec against a device copy, operations, layers of the 20b shape, whole steps, transformers.

Every part takes `smoke` (tiny shapes, any device) and returns plain values. MFU is useful FLOP/s (`gptoss_jax.model.flops`) over the dense BF16 peak
of the data sheet, without sparsity.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from gptoss_jax.formats import get_format
from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.model.flops import train_flops
from gptoss_jax.quant import default_policy, fake_quant, make_expert_quant
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import init_state, make_loss, make_train_step
from gptoss_jax.training.yaml_config import load_config
from scripts.bench.batches import random_batch
from scripts.bench.common import best
from scripts.bench.gpu_correctness import TINY

PEAK_TFLOPS = {"H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "GB200": 2500, "A100": 312}
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def memory() -> dict:
    """GiB: largest use so far and what JAX may use; nothing on devices that do not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return {name: round(stats[key] / 2**30, 2) for name, key in (("peak_gib", "peak_bytes_in_use"), ("limit_gib", "bytes_limit")) if key in stats}


def rates(config: GptOssConfig, rows: int, length: int, seconds: float) -> dict:
    kind = jax.devices()[0].device_kind
    peak = max((value for name, value in PEAK_TFLOPS.items() if name in kind), default=None)
    tflops = train_flops(config, rows, length) / seconds / 1e12
    found = {"seconds": round(seconds, 5), "tokens_per_s": round(rows * length / seconds, 1), "useful_tflops_per_s": round(tflops, 2)}
    return found | ({"mfu": round(tflops / peak, 4)} if peak else {})


def random_params(config: GptOssConfig, dtype) -> dict:
    """Normal weights made layer by layer in their own dtype: the stacked experts of 20b are 6.4e9 elements, of which no second copy fits."""

    @partial(jax.jit, static_argnums=(1,))
    def fill(key, shape):
        one = lambda k: (0.02 * jax.random.normal(k, shape[1:], jnp.float32)).astype(dtype)
        return lax.map(one, jax.random.split(key, shape[0]))

    params = {}
    for number, (name, leaf) in enumerate(abstract_params(config).items()):
        if "norm" in name:
            params[name] = jnp.ones(leaf.shape, dtype)
        elif name.endswith("bias") or len(leaf.shape) < 2:
            params[name] = jnp.zeros(leaf.shape, dtype)
        else:
            # [L, E, out, in] as L*E matrices
            flat = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]) if len(leaf.shape) == 4 else leaf.shape
            params[name] = fill(jax.random.key(number), flat).reshape(leaf.shape)
    return params


# ---- codec -----------------------------------------------------------------------------------------------------------------------------
def codec_speed(smoke: bool) -> dict:
    """Fractions of the device copy's bandwidth for one layer of 20b experts; bytes counted are those that must be read and written once."""
    shape = (2, 64, 64) if smoke else (32, 5760, 2880)
    f32 = 0.02 * jax.random.normal(jax.random.key(0), shape)
    bf16 = f32.astype(jnp.bfloat16)
    flip = jax.jit(lambda x: lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint16) ^ jnp.uint16(1), jnp.bfloat16))
    copy = 4 * f32.size / best(flip, bf16, repeats=10)
    rows = [{"op": "copy bfloat16", "gb_per_s": round(copy / 1e9, 1)}]
    for name in ("mxfp4", "nvfp4"):
        fmt = get_format(name)
        packed = fmt.encode(bf16)
        small = sum(leaf.nbytes for leaf in packed)
        cases = {
            "fake quant float32 -> bfloat16": (jax.jit(partial(fake_quant, fmt=fmt, dtype=jnp.bfloat16)), f32, 6 * f32.size),
            "fake quant bfloat16 -> bfloat16": (jax.jit(partial(fake_quant, fmt=fmt)), bf16, 4 * f32.size),
            "encode bfloat16": (jax.jit(fmt.encode), bf16, 2 * f32.size + small),
            "decode -> bfloat16": (jax.jit(fmt.decode), packed, 2 * f32.size + small),
        }
        for case, (run, argument, moved) in cases.items():
            seconds = best(run, argument, repeats=10)
            rows.append({"op": f"{name} {case}", "ms": round(1e3 * seconds, 4), "bound_ms": round(1e3 * moved / copy, 4),
                         "of_copy": round(moved / copy / seconds, 3)})  # fmt: skip
    return {"shape": list(shape), "rows": rows, **memory()}


# ---- operations ------------------------------------------------------------------------------------------------------------------------
def op_speed(smoke: bool) -> dict:
    """Forward and backward of attention, experts and cross-entropy at 20b shapes, bfloat16, every backend; beside dense products."""
    from gptoss_jax.model.flops import visible_pairs
    from gptoss_jax.ops.attention import attention
    from gptoss_jax.ops.cross_entropy import cross_entropy_sum
    from gptoss_jax.ops.experts import expert_mlp

    z = TINY if smoke else GptOssConfig()
    rows, length = (1, 32) if smoke else (4, 4096)
    tokens, dense = rows * length, 64 if smoke else 8192
    square = jnp.ones((dense, dense), jnp.bfloat16)
    rate = 2 * dense**3 / best(jax.jit(lambda a: a @ a), square, repeats=10)
    key = iter(jax.random.split(jax.random.key(0), 32))
    normal = lambda *shape, scale=1.0: (scale * jax.random.normal(next(key), shape)).astype(jnp.bfloat16)
    segments = jnp.ones((rows, length), jnp.int32)
    q = normal(rows, length, z.num_attention_heads, z.head_dim)
    k, v = (normal(rows, length, z.num_key_value_heads, z.head_dim) for _ in range(2))
    choice = jnp.argsort(jax.random.uniform(next(key), (tokens, z.num_local_experts)), axis=1)[:, : z.num_experts_per_tok].astype(jnp.int32)
    pair_flops = lambda window: 12 * rows * visible_pairs(length, window) * z.num_attention_heads * z.head_dim

    def attend(backend, window):
        return (lambda *a: attention(*a, segments, window, backend=backend)), (q, k, v, normal(z.num_attention_heads)), pair_flops(window)

    def experts(backend):
        wide, hidden, count = 2 * z.intermediate_size, z.hidden_size, z.num_local_experts
        up, down = normal(count, wide, hidden, scale=0.02), normal(count, hidden, z.intermediate_size, scale=0.02)
        arguments = normal(tokens, hidden), up, normal(count, wide), down, normal(count, hidden)
        weights = jnp.full(choice.shape, 0.25, jnp.float32)
        run = lambda x, *w: expert_mlp(x, choice, weights, *w, limit=7.0, backend=backend)
        return run, arguments, 6 * tokens * z.num_experts_per_tok * 3 * hidden * z.intermediate_size

    def loss(backend):
        weights, targets = jnp.ones((rows, length)), jnp.zeros((rows, length), jnp.int32)
        run = lambda h, w: cross_entropy_sum(h, w, targets, weights, jnp.dtype(jnp.bfloat16))
        return run, (normal(rows, length, z.hidden_size), normal(z.vocab_size, z.hidden_size, scale=0.02)), 6 * tokens * z.vocab_size * z.hidden_size

    cases = {"experts": experts, "full attention": partial(attend, window=None), "sliding attention": partial(attend, window=z.sliding_window)}
    runs = [(name, backend, make) for name, make in cases.items() for backend in (("xla",) if smoke else ("triton", "xla"))]
    found = []
    for name, backend, make in [*runs, ("cross-entropy", "xla", loss)]:
        row = {"op": name, "backend": backend}
        try:
            run, arguments, flops = make(backend)
            scalar = lambda *a, run=run: jnp.sum(run(*a).astype(jnp.float32))
            seconds = best(jax.jit(jax.grad(scalar, argnums=tuple(range(len(arguments))))), *arguments, repeats=5)
            row |= {"ms": round(1e3 * seconds, 3), "tflops_per_s": round(flops / seconds / 1e12, 1), "of_dense": round(flops / rate / seconds, 3)}
        except Exception as error:  # out of memory in one backend says nothing about the next
            row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        found.append(row)
    return {"rows_x_length": [rows, length], "dense_tflops_per_s": round(rate / 1e12, 1), "rows": found, **memory()}


# ---- layers and steps --------------------------------------------------------------------------------------------------------------------
def layers(smoke: bool) -> dict:
    """Forward and backward of one sliding and one full layer of 20b with a small vocabulary, SFT and QAT, at two microbatch sizes."""
    config = TINY if smoke else dataclasses.replace(GptOssConfig(), num_hidden_layers=2, layer_types=(), vocab_size=8192)
    found = []
    for rows, length in ((1, 16),) if smoke else ((4, 4096), (16, 4096)):
        batch = random_batch(config.vocab_size, rows, length)
        params = random_params(config, jnp.bfloat16)
        seconds = {}
        for mode in ("sft", "qat"):
            train = parse({"steps": 10, "batch": {"rows": rows}, "master_dtype": "bfloat16"})
            loss = make_loss(config, train, make_expert_quant(default_policy("mxfp4") if mode == "qat" else None, jnp.bfloat16))
            run = jax.jit(jax.grad(lambda p, b, loss=loss, n=rows * length: loss(p, {}, b, jnp.float32(n), jnp.float32(n))[0]))
            try:
                seconds[mode] = best(run, params, batch, repeats=5)
                found.append({"mode": mode, "batch": [rows, length], **rates(config, rows, length, seconds[mode])})
            except Exception as error:  # the larger batch may not fit
                found.append({"mode": mode, "batch": [rows, length], "error": f"{type(error).__name__}: {str(error)[:300]}"})
        if len(seconds) == 2:
            found.append({"batch": [rows, length], "qat_over_sft": round(seconds["qat"] / seconds["sft"], 4),
                          "qat_extra_ms": round(1e3 * (seconds["qat"] - seconds["sft"]), 3)})  # fmt: skip
    return {"rows": found, **memory()}


def _depth_that_fits(config: GptOssConfig, bytes_per_param: float, spare_gib: float) -> int:
    """Layers, an even number up to the model's, whose state fits beside `spare_gib`; all of them where the device does not say what it has."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return config.num_hidden_layers
    count = lambda depth: sum(p.size for p in abstract_params(dataclasses.replace(config, num_hidden_layers=depth, layer_types=())).values())
    depths = range(2, config.num_hidden_layers + 1, 2)
    return max((d for d in depths if bytes_per_param * count(d) + spare_gib * 2**30 <= limit), default=2)


def whole_step(smoke: bool, *, mode: str) -> dict:
    """Whole steps of 20b under `configs/*_20b_1gpu.yaml`, at the depth that fits the device: 24 layers on 141 GB, fewer below."""
    train = load_config(CONFIGS / {"sft": "sft_20b_1gpu.yaml", "qat": "qat_mxfp4_20b_1gpu.yaml"}[mode])
    config, length = (TINY, 16) if smoke else (GptOssConfig(), train.data.row_length)
    train = train.model_copy(update={"steps": 1000, "epochs": None})
    if not smoke:
        depth = _depth_that_fits(config, bytes_per_param=6.05, spare_gib=14)
        config = dataclasses.replace(config, num_hidden_layers=depth, layer_types=())
    rows = train.batch.rows
    batch = random_batch(config.vocab_size, rows, length)
    quant = make_expert_quant(default_policy("mxfp4") if mode == "qat" else None, jnp.dtype(train.compute_dtype))
    step = make_train_step(config, train, quant)
    state = init_state(config, train, random_params(config, jnp.dtype(train.master_dtype)), donate=True)
    start = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start
    plan = compiled.memory_analysis()
    seconds = []
    for _ in range(2 if smoke else 6):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    return {
        "mode": mode, "layers": config.num_hidden_layers, "of_layers": 24, "batch": [rows, length], "compile_s": round(compile_s, 1),
        "plan_gib": round(plan.temp_size_in_bytes / 2**30, 2) if plan else None, "loss": loss,
        **rates(config, rows, length, min(seconds[1:])), "all_seconds": [round(s, 4) for s in seconds], **memory(),
    }  # fmt: skip


def transformers_layers(smoke: bool) -> dict:
    """The two layers of `layers` in transformers on the same device, bfloat16, forward and backward; the best of what runs."""
    import torch
    from transformers import GptOssForCausalLM

    from tests.support.torch_model import hf_config

    if not smoke and not torch.cuda.is_available():
        return {"skipped": f"torch {torch.__version__} has no CUDA here"}
    device = "cpu" if smoke else "cuda"
    config = TINY if smoke else dataclasses.replace(GptOssConfig(), num_hidden_layers=2, layer_types=(), vocab_size=8192)
    found = []
    for experts in ("eager",) if smoke else ("grouped_mm", "eager"):
        for attention in ("eager",) if smoke else ("flex_attention", "eager"):
            for rows, length in ((1, 16),) if smoke else ((4, 4096), (1, 4096)):
                row = {"experts": experts, "attention": attention, "batch": [rows, length]}
                try:
                    settings = hf_config(config)
                    settings._experts_implementation, settings._attn_implementation = experts, attention
                    model = GptOssForCausalLM(settings).to(device, torch.bfloat16).train()
                    tokens = torch.randint(0, config.vocab_size, (rows, length), device=device)

                    def run(model=model, tokens=tokens):
                        model.zero_grad(set_to_none=True)
                        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                        return torch.cuda.synchronize() if device == "cuda" else None

                    row |= rates(config, rows, length, best(run, repeats=3))
                except Exception as error:  # eager attention of 4 rows of 4096 tokens may not fit
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                finally:
                    model = run = None
                    if device == "cuda":
                        torch.cuda.empty_cache()
                found.append(row)
    return {"torch": torch.__version__, "rows": found}
