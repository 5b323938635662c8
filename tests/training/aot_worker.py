"""Compiles the training step of a config without allocating anything, and prints the compiler's sizes as one JSON object.

    python -m tests.training.aot_worker DEVICES CONFIG [OVERRIDE...]

A process of its own, since the number of CPU devices is fixed when JAX starts. CONFIG is a YAML file or "none".
"""

import json
import sys
import time

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))

from gptoss_jax.quant import make_expert_quant  # noqa: E402
from gptoss_jax.training.plan import Layout, architecture  # noqa: E402
from gptoss_jax.training.stage import make_shardings, quant_policy  # noqa: E402
from gptoss_jax.training.step import abstract_state, make_train_step  # noqa: E402
from gptoss_jax.training.yaml_config import load_config  # noqa: E402


def main() -> None:
    train = load_config(None if sys.argv[2] == "none" else sys.argv[2], sys.argv[3:])
    train = train.model_copy(update={"steps": 1, "epochs": None})
    config, _ = architecture(train.model)
    shardings = make_shardings(train, config)
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), Layout(config, train).batch)
    start = time.monotonic()
    step = make_train_step(config, train, make_expert_quant(quant_policy(train, config), train.compute_dtype), shardings)
    lowered = step.lower(abstract_state(config, train, shardings), batch)
    middle = time.monotonic()
    compiled = lowered.compile()
    sizes = compiled.memory_analysis()
    print(json.dumps({
        "arguments": sizes.argument_size_in_bytes, "outputs": sizes.output_size_in_bytes, "temporaries": sizes.temp_size_in_bytes,
        "lower_seconds": round(middle - start, 1), "compile_seconds": round(time.monotonic() - middle, 1),
    }))  # fmt: skip


main()
