"""A roofline: the longest of products, memory traffic and communication, which at best overlap fully.

The efficiency of the products, 30 % of the dense BF16 peak, is an assumption and no bound. Published steps of gpt-oss on H100 reach 23 to 28 % all
told (NVIDIA NeMo AutoModel, docs/performance-summary.mdx: 104,000 tokens/s for 20b on 8 GPUs, 488,000 for 120b on 64), with other batches and
layouts, and lie above what this gives; we have measured none.
"""

from typing import NamedTuple

from gptoss_jax.model.flops import forward_flops, train_flops
from gptoss_jax.training.optimizer import split_frozen, trainable
from gptoss_jax.training.plan.devices import Device
from gptoss_jax.training.plan.layout import Layout, device_bytes
from gptoss_jax.training.plan.memory import layer_bytes
from gptoss_jax.training.plan.traffic import traffic

EFFICIENCY = 0.3


class Speed(NamedTuple):
    """Seconds of one step on every device, FLOP by useful and by executed products of all devices."""

    compute: float
    memory: float
    communication: float
    useful_flops: int
    executed_flops: int
    tokens: int

    @property
    def step(self) -> float:
        """All three at once."""
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "communication"), key=lambda name: getattr(self, name))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step

    @property
    def tokens_per_second_in_turn(self) -> float:
        """Products and memory traffic at once, communication before or after."""
        return self.tokens / (max(self.compute, self.memory) + self.communication)


def speed(layout: Layout, device: Device, efficiency: float = EFFICIENCY) -> Speed:
    config, train = layout.config, layout.train
    rows, length, devices = train.batch.rows, train.data.row_length, layout.sizes.size
    # a frozen product has one gradient, that of its input; products of adapters, and merging them, are small and not counted
    useful = 2 * forward_flops(config, rows, length) if train.lora else train_flops(config, rows, length)
    layers = forward_flops(config, rows, length, logits=False)
    executed = useful + (layers if train.remat == "layer" else 0)
    if layout.teacher:
        executed += forward_flops(layout.teacher.config, rows, length)
    compute = executed / devices / (device.peak_flops * efficiency)
    return Speed(
        compute, _moved_bytes(layout) / device.memory_rate, sum(c.seconds for c in traffic(layout, device)), useful, executed, rows * length
    )


def _moved_bytes(layout: Layout) -> float:
    """Bytes that a device reads and writes in a step: per microbatch the teacher's weights, masters once in each pass (cast or encoded), compute
    weights of experts written and read in forward, recomputation and twice in backward, values of layers written and read in each pass and their
    gradients as much; then gradients, masters and moments once each way."""
    train, config, c = layout.train, layout.config, layout.compute_bytes
    passes = 1 if train.remat == "none" else 2
    trained, _ = split_frozen(trainable(train, layout.state.params), train.freeze)
    masters = device_bytes(layout.state.params)
    teacher = device_bytes(layout.teacher.params) if layout.teacher else 0
    gradients = device_bytes({name: layout.state.params[name] for name in trained})
    weights = config.num_hidden_layers * sum(layout.expert_elements)
    values = sum(sum(layer_bytes(layout, kind)) for kind in config.layer_types)
    microbatch = teacher + passes * masters + weights * (c * (2 * passes + 2) + 4 + c) + 2 * values * (passes + 1) + 3 * gradients
    return train.batch.accumulation * microbatch + 2 * (masters + device_bytes(layout.state.opt_state)) + gradients
