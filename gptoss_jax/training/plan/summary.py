"""A plan as plain values: what `gptoss-jax plan --json` prints, and what its tables are made of."""

from typing import Any

from gptoss_jax.model import GptOssConfig, abstract_params
from gptoss_jax.training.plan.devices import FRAGMENTED, POOL, Device
from gptoss_jax.training.plan.memory import ASSUMED, COMPUTED, ESTIMATED
from gptoss_jax.training.plan.search import Candidate
from gptoss_jax.training.plan.traffic import expert_rows, traffic

# parameters by what their name ends with or holds; the first that matches
GROUPS = (
    ("experts", ("mlp.experts.",)),
    ("attention", ("self_attn.",)),
    ("router", ("mlp.router.",)),
    ("embedding", ("embed_tokens.",)),
    ("unembedding", ("lm_head.",)),
    ("norms", ("norm",)),
)


def parameters(config: GptOssConfig) -> dict[str, int]:
    """Elements by part, in the order of `GROUPS`; with `total`, and `per token`: those that a token meets in products."""
    counts = dict.fromkeys((name for name, _ in GROUPS), 0)
    for name, leaf in abstract_params(config).items():
        counts[next(group for group, marks in GROUPS if any(mark in name for mark in marks))] += leaf.size
    total = sum(counts.values())
    idle = counts["experts"] - counts["experts"] * config.num_experts_per_tok // config.num_local_experts
    return {**counts, "total": total, "per token": total - idle - counts["embedding"]}


def summary(candidate: Candidate, device: Device, efficiency: float) -> dict[str, Any]:
    """Everything about one layout. Bytes and seconds are per device and step; `source` says how a number was found."""
    layout, memory, speed = candidate.layout, candidate.memory, candidate.speed
    return {
        "devices": {"name": device.name, "count": layout.sizes.size, "per_node": device.per_node},
        "mesh": layout.sizes.model_dump(),
        "remat": layout.train.remat,
        "microbatches": layout.train.batch.accumulation,
        "tokens_per_device_and_microbatch": layout.tokens,
        "parameters": parameters(layout.config),
        "memory": {
            "parts": [{"name": p.name, "bytes": p.num_bytes, "source": p.source, "phases": list(p.phases)} for p in memory.parts],
            "peak": memory.peak,
            "peak_phase": memory.peak_phase,
            "usable": device.usable,
            "usable_source": f"{ASSUMED}: {POOL:.0%} of {device.memory / 2**30:.0f} GiB, {FRAGMENTED:.0%} of it lost between allocations",
            "fits": candidate.fits(device),
        },
        "communication": {
            "collectives": [
                {"what": c.what, "kind": c.kind, "axes": list(c.axes), "bytes": c.num_bytes, "seconds": c.seconds} for c in traffic(layout, device)
            ],
            # rows to the experts of one layer, and as many back
            "expert_rows": {"transport": layout.transport, **expert_rows(layout)},
            "seconds": speed.communication,
            "source": f"bytes {COMPUTED} or {ESTIMATED} from shapes, rates {ASSUMED}: as the makers state",
        },
        "speed": {
            "useful_flops": speed.useful_flops,
            "executed_flops": speed.executed_flops,
            "compute_seconds": speed.compute,
            "memory_seconds": speed.memory,
            "bound": speed.bound,
            "tokens_per_second": speed.tokens_per_second,
            "tokens_per_second_in_turn": speed.tokens_per_second_in_turn,
            "efficiency": efficiency,
            "source": f"{ASSUMED}: products at {efficiency:.0%} of {device.peak_flops / 1e12:.0f} TFLOP/s, memory and links at the makers' rates",
        },
    }
