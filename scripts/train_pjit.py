"""A training script of your own: your mesh and axis names, your loss, your Optax chain; the library gives model, layout and 4-bit weights.

    python scripts/train_pjit.py MODEL DATA.jsonl OUT --replica 2 --model 4 --format mxfp4

MODEL is any directory with a tokenizer that `load_params` reads ("nano" comes along). Runs on one process or, under any launcher that
`gptoss_jax.initialize` knows, on many. OUT gets `checkpoint/` (plain Orbax) and `export/` (safetensors).
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec
from orbax.checkpoint import v1 as ocp

import gptoss_jax as gj


def layout(replica: int, model: int, axis_type: AxisType) -> tuple[jax.sharding.Mesh, gj.ShardingRules]:
    """A mesh with axes of our own, and what they cut: rows go over both, weights are stored in parts over `model`."""
    mesh = jax.make_mesh((replica, model), ("replica", "model"), axis_types=(axis_type,) * 2)
    table = dict.fromkeys(gj.DEFAULT_RULES.table, ()) | {"batch": ("replica", "model"), "embed": ("model",), "expert": ("model",)}
    return mesh, gj.ShardingRules(table, gathered=("model",))


def batches(tokenizer, file: str, rows: int, length: int, sharding):
    """Endless global batches, of which every process makes the rows of its own devices."""
    packed = gj.pack(gj.encode_conversations(gj.load_rows(file).rows, tokenizer), length)
    for batch in gj.BatchStream(packed.rows, rows, 0, tokenizer, gj.local_rows(rows, length, sharding)):
        yield gj.place_rows(batch, rows, sharding)


def make_step(config, optimizer, expert_quant, distribute, shardings):
    cross_entropy = distribute.loss(partial(gj.cross_entropy_sum, dtype=jnp.bfloat16))

    def loss(params, batch: gj.Batch):
        out = gj.forward(
            config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT,
            dtype=jnp.bfloat16, expert_quant=expert_quant, distribute=distribute, remat="layer",
        )  # fmt: skip
        total = cross_entropy(out.hidden_BTD, params["lm_head.weight"], batch.targets_BT, batch.loss_weights_BT)
        return total / jnp.maximum(jnp.sum(batch.loss_weights_BT), 1)

    gradients = jax.value_and_grad(loss)
    mesh = next(iter(shardings.values())).mesh
    if AxisType.Explicit in mesh.axis_types:  # the model leaves what lies between given shardings to the compiler
        results = PartitionSpec(), {name: sharding.spec for name, sharding in shardings.items()}
        gradients = jax.sharding.auto_axes(gradients, axes=mesh.axis_names, out_sharding=results)

    def step(params, opt_state, batch):
        value, grads = gradients(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return jax.jit(step, donate_argnums=(0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_dir")
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--replica", type=int, default=1)
    parser.add_argument("--model", type=int, default=1)
    parser.add_argument("--axis-type", choices=("Auto", "Explicit"), default="Auto")
    parser.add_argument("--format", choices=("mxfp4", "nvfp4", "bf16"), default="mxfp4")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()

    gj.initialize()
    mesh, rules = layout(options.replica, options.model, AxisType[options.axis_type])
    source = gj.open_checkpoint(options.model_dir)
    shardings, rows = gj.param_shardings(source.config, mesh, rules), gj.batch_sharding(mesh, rules)
    config, params = gj.load_params(source, jnp.float32, shardings)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.0))
    opt_state = optimizer.init(params)  # not under jit: moments then lie as their parameters do
    policy = None if options.format == "bf16" else gj.default_policy(options.format)
    step = make_step(config, optimizer, gj.make_expert_quant(policy, jnp.bfloat16), gj.distribution(mesh, rules), shardings)

    stream = batches(gj.load_tokenizer(source.path), options.data, options.rows, options.length, rows)
    for number, batch in zip(range(options.steps), stream):
        with jax.set_mesh(mesh):
            params, opt_state, value = step(params, opt_state, batch)
        if gj.is_first():
            print(f"step {number + 1}: loss {np.asarray(value):.6f}", flush=True)

    ocp.save_checkpointables(options.out.absolute() / "checkpoint", {"params": params, "optimizer": opt_state})
    gj.export_hf(options.out / "export", config, params, format=options.format, source_dir=source.path)


if __name__ == "__main__":
    main()
