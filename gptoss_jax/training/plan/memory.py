"""Bytes that one device holds, part by part, at the moments that can be its peak: three of a step, and the checkpoint of a QAT run.

    loss        state + kept values of the layers + a block of logits, its gradients, and the gradient of the unembedding
    backward    state + kept values + gradients + one period of layers recomputed and differentiated
    optimizer   state + gradients + what the update copies
    checkpoint  state + codes of all experts, which are hashed, + the forward pass of a layer (QAT)

Masters, moments and the batch are computed from the shapes and shardings of the program itself: they are its arguments, byte for byte. All else is
estimated from the shapes of the operations: a compiler may keep more (copies between layouts) or less (values that fuse away).

Legend: S tokens of a device's microbatch  P slots of the expert buffer  D hidden  U=2F gate and up  F expert hidden  V vocabulary
"""

from typing import NamedTuple

from gptoss_jax.model.config import FULL
from gptoss_jax.model.lora import is_adapter
from gptoss_jax.ops.cross_entropy.blocks import MAX_BLOCK_LOGITS
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.training.optimizer import split_frozen, trainable
from gptoss_jax.training.plan.layout import Layout, device_bytes

COMPUTED, ESTIMATED, ASSUMED = "computed", "estimated", "assumed"
STEP = ("loss", "backward", "optimizer")
PHASES = (*STEP, "checkpoint")


class Part(NamedTuple):
    """`phases`: the moments at which the bytes are held."""

    name: str
    num_bytes: int
    source: str
    phases: tuple[str, ...] = PHASES


class Memory(NamedTuple):
    parts: tuple[Part, ...]

    def at(self, phase: str) -> int:
        return sum(part.num_bytes for part in self.parts if phase in part.phases)

    @property
    def peak_phase(self) -> str:
        return max(PHASES, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.peak_phase)


class LayerBytes(NamedTuple):
    """Values of one layer: its input; what matrix products and the sort made; what `none` keeps besides."""

    layer_input: int
    products: int
    others: int


def layer_bytes(layout: Layout, kind: str) -> LayerBytes:
    config, c = layout.config, layout.compute_bytes
    tokens, exchanged, slots = layout.tokens, layout.exchanged_tokens, layout.slots
    hidden, width = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads // layout.sizes.tensor, config.num_key_value_heads // layout.sizes.tensor
    keys = layout.train.data.row_length * layout.rows if kind == FULL else tokens + layout.rows * config.sliding_window * (layout.sizes.context > 1)
    attention = tokens * (2 * heads + 2 * kv_heads) * config.head_dim * c + 4 * tokens * heads  # q, k, v, out, lse
    routing = 12 * exchanged * config.num_experts_per_tok + 4 * slots
    wide = slots * (2 * width + hidden) * c  # h, y
    others = 3 * tokens * hidden * c + 4 * tokens * hidden  # two normed inputs, o_proj's input, float32 for the router
    others += (tokens * heads + (keys if layout.sizes.context > 1 else tokens) * 2 * kv_heads) * config.head_dim * c  # rotated q, k; v
    others += 12 * tokens * config.num_local_experts  # router logits, softmax, choices
    if layout.sizes.expert > 1:
        others += exchanged * hidden * c
        if layout.transport == "ragged":
            others += tokens * min(config.num_experts_per_tok, layout.sizes.expert) * hidden * c  # the send buffer
    if layout.kernels == "triton":
        others += slots * (hidden + width) * c  # rows of x by slot, activation
    return LayerBytes(tokens * hidden * c, attention + routing + wide + tokens * hidden * c, others)


def kept_values(layout: Layout) -> int:
    """What all layers hold from the forward to the backward pass."""
    config, remat = layout.config, layout.train.remat
    layers = [layer_bytes(layout, kind) for kind in config.layer_types]
    inputs = sum(layer.layer_input for layer in layers)
    if remat == "layer":
        return inputs
    kept = inputs + sum(layer.products for layer in layers)
    if remat == "products":
        return kept
    return kept + sum(layer.others for layer in layers) + config.num_hidden_layers * decoded_weights(layout)


def decoded_weights(layout: Layout) -> int:
    """Compute weights of one layer's experts, whole on this device, and the codes that travelled (or that adapters were merged to)."""
    elements = sum(layout.expert_elements)
    travelling = elements * layout.code_bytes if layout.train.quant and (layout.gathered > 1 or layout.train.lora) else 0
    return int(elements * layout.compute_bytes + travelling)


def differentiated_layer(layout: Layout) -> int:
    """Values and gradients of the layer that the backward pass is in, without its decoded weights and their gradients."""
    config, c = layout.config, layout.compute_bytes
    layer = max((layer_bytes(layout, kind) for kind in config.layer_types), key=sum)
    gradients = layout.slots * (2 * config.intermediate_size + config.hidden_size) * c + 2 * layout.tokens * config.hidden_size * 4
    held = {"layer": layer.products + layer.others, "products": layer.others, "none": 0}[layout.train.remat]
    return held + gradients


def weight_gradients(layout: Layout) -> int:
    """Of the experts of one layer: float32 sums of the larger projection, both in the compute dtype, before they are cut and stored."""
    up, down = layout.expert_elements
    return 4 * up + layout.compute_bytes * (up + down) + (4 * up // layout.gathered if layout.gathered > 1 else 0)


def memory(layout: Layout) -> Memory:
    """All parts of one device."""
    config, train, c = layout.config, layout.train, layout.compute_bytes
    state = layout.state
    trained, _ = split_frozen(trainable(train, state.params), train.freeze)
    trained_bytes = device_bytes({name: state.params[name] for name in trained})
    trained_elements = trained_bytes // layout.master_bytes
    largest = max(device_bytes(state.params[name]) for name in trained) // layout.master_bytes
    vocab_here = config.vocab_size // layout.over("vocab")
    block, head = min(layout.tokens, max(1, MAX_BLOCK_LOGITS // vocab_here)) * vocab_here, vocab_here * config.hidden_size
    experts = {name for name in state.params if name.endswith(PROJECTIONS)}
    accumulated = train.batch.accumulation > 1
    residual = state.opt_state[-1] if train.optimizer.master_residual else {}
    moments = device_bytes(state.opt_state) - device_bytes(residual)
    other = device_bytes((state.step, state.skipped, state.skipped_in_row, layout.batch))

    forward = max(sum(layer_bytes(layout, kind)) for kind in config.layer_types)
    if train.lora:  # on one device
        stored_elements = config.num_hidden_layers * sum(layout.expert_elements)
    else:
        stored_elements = device_bytes({name: state.params[name] for name in experts}) // layout.master_bytes
    codes = int(stored_elements * layout.stored_code_bytes)

    unembedding = Part("unembedding: compute weights, float32 gradient", head * (c + 4), ESTIMATED, ("loss",))
    if train.lora:  # frozen: no gradient, and no copy where it is held in the compute dtype
        held = state.params["lm_head.weight"].dtype.itemsize
        unembedding = Part("unembedding: compute weights", head * c if held != c else 0, ESTIMATED, ("loss",))
    adapters = {name: leaf for name, leaf in state.params.items() if is_adapter(name)}
    parts = []
    if train.lora:
        frozen = {name: leaf for name, leaf in state.params.items() if name not in adapters}
        parts.append(Part(f"frozen model, {train.lora.base}", device_bytes(frozen), COMPUTED))
    parts.append(Part(f"{'adapters' if train.lora else 'masters'}, {train.master_dtype}", device_bytes(adapters or state.params), COMPUTED))
    if residual:
        parts.append(Part(f"residual of the masters, {train.optimizer.master_residual}", device_bytes(residual), COMPUTED))
    parts += [
        Part(f"moments, {train.optimizer.first_moment} and {train.optimizer.second_moment}", moments, COMPUTED),
        Part("batch and counters", other, COMPUTED),
    ]
    if layout.teacher:
        parts.append(Part(f"teacher, {train.compute_dtype}", device_bytes(layout.teacher.params), COMPUTED))
    if train.cast_at == "step":
        parts.append(Part("compute weights of all experts (cast_at: step)", stored_elements * c, ESTIMATED))
    if accumulated:
        parts.append(Part("gradients summed over microbatches, float32", 4 * trained_elements, ESTIMATED, STEP))
    parts += [
        Part(f"gradients, {train.master_dtype}", trained_bytes, ESTIMATED, ("backward",) if accumulated else ("backward", "optimizer")),
        Part(f"kept of the layers (remat: {train.remat})", kept_values(layout), ESTIMATED, ("loss", "backward")),
        Part("experts of a layer, decoded", decoded_weights(layout), ESTIMATED, ("backward", "checkpoint")),
        Part("weight gradients of a layer's experts", weight_gradients(layout) if experts & set(trained) else 0, ESTIMATED, ("backward",)),
        Part(f"values and gradients of a layer ({layout.slots:,} expert slots)", differentiated_layer(layout), ESTIMATED, ("backward",)),
        Part("values of a layer, forward alone", forward, ESTIMATED, ("checkpoint",)),
        Part("codes of all experts", codes, ESTIMATED, ("checkpoint",)),
        Part("a block of logits and its gradients", block * (8 + c) * (2 if layout.teacher else 1), ESTIMATED, ("loss",)),
        unembedding,
        Part("optimizer: copy of a residual" if residual else "optimizer", largest if residual else 0, ESTIMATED, ("optimizer",)),
    ]
    if train.quant is None:  # nothing is hashed
        parts = [part._replace(phases=tuple(phase for phase in part.phases if phase != "checkpoint")) for part in parts]
    return Memory(tuple(part for part in parts if part.num_bytes and part.phases))
