"""What one device sends in a step, by collective, and how long the links take for it.

A group of n devices that puts together (all-gather) or sums and cuts (reduce-scatter) arrays of B bytes sends (n-1)/n * B per device around a ring; a
sum that all keep (all-reduce) sends twice that. Within a node the rate is that of its links; a group that spans nodes is limited by the network cards
of its members in a node, one card each, if that is less.

Backward passes repeat what the forward pass gathered unless `remat: none` keeps it. Gradients are summed in float32. The collectives of experts,
context, embedding and unembedding are written out in the program; those of attention's weights are the compiler's choice: what is listed is what fsdp
needs. What ragged rows send depends on routing: listed is what even routing sends.
"""

import math
from typing import NamedTuple

from gptoss_jax.model.config import FULL
from gptoss_jax.quant.expert_quant import PROJECTIONS
from gptoss_jax.sharding import DEFAULT_RULES, MESH_AXES
from gptoss_jax.sharding.transport import expected_share
from gptoss_jax.training.optimizer import split_frozen, trainable
from gptoss_jax.training.plan.devices import Device
from gptoss_jax.training.plan.layout import Layout

FACTORS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "neighbours": 1, "all-to-all": 1, "ragged all-to-all": 1}


class Collective(NamedTuple):
    """`num_bytes` is what one device sends per step, `seconds` the time at the link's rate alone."""

    what: str
    kind: str
    axes: tuple[str, ...]
    num_bytes: int
    seconds: float


def group_rate(layout: Layout, device: Device, axes: tuple[str, ...]) -> float:
    """Bytes/s per device of a collective over these mesh axes. Devices are numbered with the last mesh axis fastest, node after node."""
    sizes = [layout.mesh.shape[a] for a in MESH_AXES]
    members = [0]
    for i, axis in enumerate(MESH_AXES):
        if axis in axes:
            stride = math.prod(sizes[i + 1 :])
            members = [m + k * stride for m in members for k in range(sizes[i])]
    nodes = [m // device.per_node for m in members]
    if len(set(nodes)) == 1:
        return device.link_rate
    return min(device.link_rate, nodes.count(nodes[0]) * device.network_rate)


def expert_rows(layout: Layout) -> dict[str, int]:
    """Bytes of rows that one device sends to the experts of one layer, and about as many back, by transport: "ragged" at even routing."""
    config, devices = layout.config, layout.sizes.expert
    gather = (devices - 1) * layout.tokens * config.hidden_size * layout.compute_bytes
    return {"gather": gather, "ragged": int(gather * expected_share(config.num_local_experts, config.num_experts_per_tok, devices))}


def traffic(layout: Layout, device: Device) -> list[Collective]:
    """All collectives of a step that send anything, largest time first."""
    config, train, c = layout.config, layout.train, layout.compute_bytes
    axes = lambda *logical: tuple(dict.fromkeys(a for name in logical for a in DEFAULT_RULES.axes(name, layout.mesh)))
    cut = axes("expert")
    gathered = tuple(a for a in cut if a in DEFAULT_RULES.gathered)
    token_axes = axes("batch", "length")
    microbatches, layers = train.batch.accumulation, config.num_hidden_layers
    passes = 1 if train.remat == "none" else 2
    found: list[Collective] = []

    def add(what: str, kind: str, over: tuple[str, ...], whole: float, times: float = 1) -> None:
        devices = math.prod(layout.mesh.shape[a] for a in over)
        if devices > 1 and whole and times:
            sent = FACTORS[kind] * (1 if kind == "neighbours" else (devices - 1) / devices) * whole * times
            found.append(Collective(what, kind, over, int(sent), sent / group_rate(layout, device, over)))

    # experts
    elements = sum(layout.expert_elements)
    trained, _ = split_frozen(trainable(train, layout.state.params), train.freeze)
    names = {name for name in layout.state.params if name.endswith(PROJECTIONS)}
    share = len(names & set(trained)) / len(names)
    encoded = "codes" if train.quant and train.cast_at == "layer" else "weights"
    add(f"experts' {encoded}", "all-gather", gathered, elements * layout.code_bytes, passes * layers * microbatches)
    add("experts' gradients, float32", "reduce-scatter", gathered, 4 * elements, share * layers * microbatches)
    copies = tuple(a for a in token_axes if a not in cut)
    stored = layout.master_bytes * elements / layout.gathered
    add(f"experts' gradients, {train.master_dtype}", "all-reduce", copies, stored, share * layers * microbatches)
    rows = layout.exchanged_tokens * config.hidden_size * c
    exchange = tuple(a for a in cut if a not in gathered and a in token_axes)
    summed = tuple(a for a in cut if a not in gathered and a not in token_axes)
    there, back = "all-gather", "reduce-scatter"
    if layout.transport == "ragged":
        there = back = "ragged all-to-all"
        rows *= expected_share(config.num_local_experts, config.num_experts_per_tok, layout.sizes.expert)
    add("rows to experts", there, exchange, rows, (passes + 1) * layers * microbatches)
    add("rows from experts", back, exchange, rows, (passes + 1) * layers * microbatches)
    choices = 4 * config.num_experts_per_tok * layout.exchanged_tokens
    add("choices of experts and their weights", "all-gather", exchange, 2 * choices, passes * layers * microbatches)
    add("gradients of these weights", "reduce-scatter", exchange, choices, layers * microbatches)
    rows = layout.exchanged_tokens // layout.sizes.expert * config.hidden_size * c
    add("rows from experts", "all-reduce", summed, rows, (passes + 1) * layers * microbatches)
    if layout.teacher:
        teacher, matrices = layout.teacher.config, [x.size for name, x in layout.teacher.params.items() if name.endswith(PROJECTIONS)]
        put_together = c * sum(matrices) * layout.gathered / layout.over("expert")
        add("teacher's experts", "all-gather", gathered, put_together, microbatches)
        rest = sum(x.size for name, x in layout.teacher.params.items() if not name.endswith(PROJECTIONS)) / layout.over("vocab")
        add("teacher's other weights", "all-gather", axes("embed"), c * rest, microbatches)
        teacher_rows = layout.exchanged_tokens * teacher.hidden_size * c * teacher.num_hidden_layers * microbatches
        add("teacher's rows to experts", "all-gather", exchange, teacher_rows)
        add("teacher's rows from experts", "reduce-scatter", exchange, teacher_rows)
        add("teacher's rows from experts", "all-reduce", summed, teacher_rows)
    # attention
    heads = config.num_key_value_heads // layout.sizes.tensor
    full = sum(kind == FULL for kind in config.layer_types)
    keys = 2 * layout.rows * heads * config.head_dim * c
    add("keys and values of full layers", "all-gather", axes("length"), keys * train.data.row_length, passes * full * microbatches)
    add("their gradients, float32", "reduce-scatter", axes("length"), 4 / c * keys * train.data.row_length, full * microbatches)
    queries = 2 * layout.tokens * config.num_attention_heads // layout.sizes.tensor * config.head_dim * c
    add("queries and outputs, dealt evenly", "neighbours", axes("length"), queries, (passes + 1) * full * microbatches)
    add("window at the border", "neighbours", axes("length"), keys * config.sliding_window, (passes + 1) * (layers - full) * microbatches)
    add("attention output", "all-reduce", axes("heads"), layout.tokens * config.hidden_size * c, (passes + 1) * layers * microbatches)
    # everything else: cut over `embed`, whole to compute
    others = sum(p.size for name, p in layout.state.params.items() if name not in names) / layout.over("vocab")
    table = config.vocab_size * config.hidden_size / layout.over("vocab")  # of the embedding, which stays, and of the unembedding
    hidden = layout.tokens * config.hidden_size
    add("rows of the embedding", "all-to-all", axes("embed"), c * hidden, 2 * microbatches)
    add("rows of the embedding", "all-reduce", axes("vocab"), c * hidden, 2 * microbatches)
    add("gradients of the last hidden states, float32", "all-reduce", axes("vocab"), 4 * hidden, microbatches)
    add("other weights", "all-gather", axes("embed"), c * (passes * (others - 2 * table) + table), microbatches)
    add("other gradients, float32", "reduce-scatter", axes("embed"), 4 * (others - table), microbatches)
    whole_axes = tuple(a for a in token_axes if a not in axes("embed"))
    add("other gradients, float32", "all-reduce", whole_axes, 4 * others / layout.over("embed"), microbatches)
    return sorted(found, key=lambda collective: -collective.seconds)
