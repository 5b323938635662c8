"""`gptoss-jax plan`: bytes, traffic and a bound on speed before anything is allocated."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro


def plan(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    config: Path | None = None,
    device: str = "h200",
    devices: int | None = None,
    nodes: int | None = None,
    efficiency: float | None = None,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    link_gb_s: float | None = None,
    network_gb_s: float | None = None,
    show: int = 5,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> None:
    """Says what a training config takes on so many devices and which layout is estimated to be the fastest. Needs no GPU and reads no weights.

    State and batch are computed byte for byte; values between them, traffic and speed are estimated, and rates are what the makers state.

    Args:
        overrides: settings over those of the file, as model=120b data.row_length=131072 mesh=auto.
        config: YAML file of a training run.
        device: a100, rtx4090, h100, h200, b200 or gb200.
        devices: how many; default those of the config's mesh.
        nodes: machines that they are in; default as few as devices of this kind allow.
        efficiency: assumed share of the dense BF16 peak that products reach; default 0.3.
        memory_gib: memory of a device, instead of the table's.
        peak_tflops: dense BF16 peak, instead of the table's.
        link_gb_s: rate between the devices of a node in one direction, instead of the table's.
        network_gb_s: rate of a device's network card, instead of the table's.
        show: layouts to list.
        as_json: print one JSON object instead of tables.
    """
    from gptoss_jax.errors import UsageError
    from gptoss_jax.training.plan import EFFICIENCY, Layout, architecture, evaluate, find_device, search, summary
    from gptoss_jax.training.yaml_config import load_config

    train = load_config(config, overrides)
    efficiency = EFFICIENCY if efficiency is None else efficiency
    if not 0 < efficiency <= 1:
        raise UsageError(f"efficiency = {efficiency} is not a share of the peak, above 0 and at most 1")
    scaled = lambda value, unit: None if value is None else value * unit
    card = find_device(
        device, memory=scaled(memory_gib, 2**30), peak_flops=scaled(peak_tflops, 1e12), link_rate=scaled(link_gb_s, 1e9),
        network_rate=scaled(network_gb_s, 1e9),
    )  # fmt: skip
    count = devices or train.mesh.size
    if train.lora and count > 1:
        raise UsageError(f"lora runs on one device, not {count}")
    if nodes is not None:
        if nodes < 1 or count % nodes:
            raise UsageError(f"{count} devices cannot be dealt to {nodes} nodes evenly")
        card = find_device(device, **{**vars(card), "per_node": count // nodes, "name": None})
    model, where = architecture(train.model)
    found = search(model, train, card, count, efficiency=efficiency)
    own = train.mesh.size == count and not train.mesh.auto
    chosen = evaluate(Layout(model, train), card, efficiency) if own else found[0]
    values = {
        "model": {"name": train.model, "architecture": where},
        "layout": "of the config" if own else "proposed",
        **summary(chosen, card, efficiency),
        "proposals": [{"name": c.name, "peak": c.memory.peak, "fits": c.fits(card), "step_seconds": c.speed.step,
                       "tokens_per_second": c.speed.tokens_per_second,
                       "tokens_per_second_in_turn": c.speed.tokens_per_second_in_turn} for c in found[:show]],
        "layouts": {"possible": len(found), "fit": sum(c.fits(card) for c in found), "refused": dict(found.refused.most_common())},
    }  # fmt: skip
    if as_json:
        print(json.dumps(values))
    else:
        _print(values)


def _print(plan: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from gptoss_jax.training.plan.memory import PHASES

    console = Console(width=120, highlight=False)
    gib = lambda n: f"{n / 2**30:.2f}"
    mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    counts = plan["parameters"]
    where = plan["devices"]
    nodes = -(-where["count"] // where["per_node"])
    console.print(f"{plan['model']['name']} ({plan['model']['architecture']}) on {where['count']} x {where['name']}, {nodes} node{'s' * (nodes > 1)}")
    console.print(f"layout {plan['layout']}: {mesh}, remat {plan['remat']}, {plan['microbatches']} microbatch{'es' * (plan['microbatches'] > 1)} "
                  f"of {plan['tokens_per_device_and_microbatch']:,} tokens per device")  # fmt: skip
    parts = ", ".join(f"{name} {n / 1e9:.3f}" for name, n in counts.items() if name not in ("total", "per token"))
    console.print(f"parameters {counts['total'] / 1e9:.2f} G, {counts['per token'] / 1e9:.2f} G in products of a token (G: {parts})\n")

    memory = plan["memory"]
    phases = [phase for phase in PHASES if any(phase in part["phases"] for part in memory["parts"])]
    table = Table("held by one device, GiB", *phases, "", box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    for part in memory["parts"]:
        table.add_row(part["name"], *(gib(part["bytes"]) if phase in part["phases"] else "" for phase in phases), part["source"])
    total = lambda phase: sum(part["bytes"] for part in memory["parts"] if phase in part["phases"])
    table.add_row("together", *(gib(total(phase)) for phase in phases), "")
    console.print(table)
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    console.print(f"peak {gib(memory['peak'])} GiB ({memory['peak_phase']}) of {gib(memory['usable'])} usable: {verdict} "
                  f"({memory['usable_source']})\n")  # fmt: skip

    if plan["communication"]["collectives"]:
        table = Table("sent by one device in a step", "collective", "over", "GB", "ms", box=None, pad_edge=False)
        for column in table.columns[3:]:
            column.justify = "right"
        for c in plan["communication"]["collectives"]:
            table.add_row(c["what"], c["kind"], " ".join(c["axes"]), f"{c['bytes'] / 1e9:.2f}", f"{1e3 * c['seconds']:.1f}")
        console.print(table)
        console.print(f"({plan['communication']['source']})")
        rows = plan["communication"]["expert_rows"]
        if rows["gather"]:
            console.print(f"rows to the experts of a layer, and as many back: {rows['gather'] / 1e9:.2f} GB by a gather, {rows['ragged'] / 1e9:.2f} "
                          f"ragged at even routing; here {rows['transport']} (ragged: compiled for GPUs, not run)")  # fmt: skip
        console.print()

    speed = plan["speed"]
    console.print(f"a step: products {1e3 * speed['compute_seconds']:.0f} ms ({speed['executed_flops'] / 1e12:,.0f} TFLOP on all devices, "
                  f"{speed['useful_flops'] / 1e12:,.0f} useful), memory {1e3 * speed['memory_seconds']:.0f} ms, communication "
                  f"{1e3 * plan['communication']['seconds']:.0f} ms; bound by {speed['bound']}")  # fmt: skip
    console.print(f"{speed['tokens_per_second_in_turn']:,.0f} tokens/s (communication in turn) to {speed['tokens_per_second']:,.0f} (overlapped), "
                  f"estimated, not measured ({speed['source']})\n")  # fmt: skip

    layouts = plan["layouts"]
    console.print(f"{layouts['possible']} layouts can be laid out, {layouts['fit']} fit; the best by estimate:")
    table = Table("", "peak GiB", "tokens/s", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for c in plan["proposals"]:
        rate = f"{c['tokens_per_second_in_turn']:,.0f} to {c['tokens_per_second']:,.0f}"
        table.add_row(c["name"], gib(c["peak"]), rate if c["fits"] else "does not fit")
    console.print(table)
