"""Plans: bytes are those of the compiled program, proposals can be carried out, and numbers that are assumed are told apart."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.cli import main
from gptoss_jax.errors import UsageError
from gptoss_jax.model import GptOssConfig, num_params
from gptoss_jax.quant import make_expert_quant
from gptoss_jax.sharding import make_mesh, param_shardings
from gptoss_jax.training.config import parse
from gptoss_jax.training.plan import (
    DEVICES,
    Layout,
    architecture,
    device_bytes,
    evaluate,
    expert_rows,
    find_device,
    memory,
    parameters,
    present_device,
    proposed_mesh,
    search,
    traffic,
)
from gptoss_jax.training.plan.traffic import group_rate
from gptoss_jax.training.stage import quant_policy, with_mesh
from gptoss_jax.training.step import Shardings, abstract_state, make_train_step
from gptoss_jax.training.yaml_config import dump_config, load_config
from tests.training.support import CONFIG

ROOT = Path(__file__).parent.parent.parent
H200 = DEVICES["h200"]
COMPACT = {"master_dtype": "bfloat16", "optimizer": {"first_moment": "int8", "second_moment": "factored", "master_residual": "int8"}}


def planned(layout: Layout) -> tuple[int, int]:
    """Argument and output bytes that a program of this plan must have. Outputs: the state, eight metrics (ten with a teacher), four statistics of the
    router, and a pointer for each array (XLA:CPU)."""
    state, num_metrics = device_bytes(layout.state), 8 + 2 * (layout.teacher is not None)
    num_outputs = len(jax.tree.leaves(layout.state)) + num_metrics + 4
    router = layout.config.num_hidden_layers * (2 * layout.config.num_local_experts + 2) * 4
    teacher = device_bytes(layout.teacher.params) if layout.teacher else 0
    return state + teacher + device_bytes(layout.batch), state + 4 * num_metrics + router + 8 * num_outputs


def compiled(config, train, layout):
    shardings = Shardings.on(config, make_mesh(**train.mesh.model_dump())) if train.mesh.size > 1 else None
    teacher = layout.teacher and layout.teacher._replace(shardings=shardings and param_shardings(layout.teacher.config, shardings.scalar.mesh))
    step = make_train_step(config, train, make_expert_quant(quant_policy(train, config), jnp.dtype(train.compute_dtype)), shardings, teacher)
    shapes = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    teacher = (shapes(layout.teacher.params),) if layout.teacher else ()
    return step.lower(abstract_state(config, train, shardings), shapes(layout.batch), *teacher).compile().memory_analysis()


@pytest.mark.parametrize("model,sizes,changes", [
    ("nano", {"fsdp": 8}, {}),
    ("small", {"fsdp": 2, "context": 2, "tensor": 2}, {"batch": {"rows": 8, "accumulation": 2}}),
    ("small", {"fsdp": 2, "expert": 2, "data": 2}, {"quant": {"format": "mxfp4"}, **COMPACT}),
    ("nano", {"fsdp": 2, "expert": 4}, {"quant": {"format": "mxfp4"}, "distill": {"teacher": "nano"}}),
    ("small", {}, {"quant": {"format": "mxfp4"}, "lora": {"rank": 2, "base": "mxfp4"}}),
], ids=["nano-fsdp8", "context2-tensor2", "qat-compact-expert2", "qad-expert4", "qlora"])  # fmt: skip
def test_arguments_and_outputs_are_those_of_the_compiled_program(model, sizes, changes):
    config = architecture("nano")[0] if model == "nano" else dataclasses.replace(CONFIG, num_local_experts=8)
    train = parse({"steps": 1, "batch": {"rows": 8}, "data": {"row_length": 64}, "mesh": sizes, **changes})
    layout = Layout(config, train, kernels="xla")
    sizes = compiled(config, train, layout)
    assert (sizes.argument_size_in_bytes, sizes.output_size_in_bytes) == planned(layout)
    exact = sum(part.num_bytes for part in memory(layout).parts if part.source == "computed")
    assert exact == sizes.argument_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("devices,overrides", [
    (8, ["model=20b", "mesh.fsdp=8", "batch.rows=16"]),
    (64, ["model=20b", "mesh={data: 2, fsdp: 8, expert: 4}", "batch.rows=64"]),
    (64, ["model=120b", "mesh={fsdp: 8, expert: 8}", "batch.rows=64", "quant.format=mxfp4"]),
], ids=["20b-8", "20b-64", "120b-64"])  # fmt: skip
def test_released_sizes_on_virtual_devices(devices, overrides):
    """No array is allocated; the compiler's sizes are the plan's."""
    command = [sys.executable, "-m", "tests.training.aot_worker", str(devices), "none", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = json.loads(done.stdout)
    train = load_config(None, [*overrides, "steps=1"])
    config, _ = architecture(train.model)
    layout = Layout(config, train, kernels="xla")
    assert (sizes["arguments"], sizes["outputs"]) == planned(layout)
    held = memory(layout).peak - sizes["arguments"]
    print(f"{sizes}; temporaries planned {held / 2**30:.2f} GiB, compiled for CPU {sizes['temporaries'] / 2**30:.2f} GiB")


def test_parameters_are_those_of_the_releases():
    for config, total, per_token in ((GptOssConfig.gpt_oss_20b(), 20.91, 3.6), (GptOssConfig.gpt_oss_120b(), 116.83, 5.1)):
        counts = parameters(config)
        assert counts["total"] == num_params(config) == sum(counts[name] for name in list(counts)[:6])
        assert counts["total"] / 1e9 == pytest.approx(total, abs=0.01) and counts["per token"] / 1e9 == pytest.approx(per_token, abs=0.1)


def layout_of(*overrides, config=None):
    train = load_config(None, ["model=20b", *overrides])
    return Layout(config or architecture(train.model)[0], train)


def collectives(layout, device=H200):
    return {c.what: c for c in traffic(layout, device)}


def test_codes_travel_at_a_quarter_of_the_bytes_and_over_their_axes_only():
    sft, qat = (collectives(layout_of("mesh={fsdp: 4, expert: 2}", *quant)) for quant in ((), ("quant.format=mxfp4",)))
    assert qat["experts' codes"].num_bytes / sft["experts' weights"].num_bytes == pytest.approx(4.25 / 16)
    # 16 experts are put together over 4 devices: 3/4 of their bfloat16 arrives from elsewhere, in 24 layers, forward and backward
    assert sft["experts' weights"].num_bytes == 3 * 16 * 3 * 2880**2 * 2 // 4 * 24 * 2 and sft["experts' weights"].axes == ("fsdp",)
    assert {sft[what].axes for what in ("rows to experts", "rows from experts")} == {("expert",)}
    assert not traffic(layout_of("batch.rows=4"), H200)


def test_ragged_rows_send_what_even_routing_needs():
    """32 experts, 4 of a token, over 8 devices: a row is needed on a given one with probability 1 - C(28, 4)/C(32, 4) = 0.43."""
    layouts = [layout_of("mesh={expert: 8}", f"expert_transport={transport}") for transport in ("gather", "ragged", "auto")]
    gather, ragged, auto = ({what: c for what, c in collectives(layout).items() if what.startswith("rows")} for layout in layouts)
    for what in ("rows to experts", "rows from experts"):
        assert ragged[what].num_bytes / gather[what].num_bytes == pytest.approx(1 - 20475 / 35960, rel=1e-6)
        assert (gather[what].kind != "ragged all-to-all") and ragged[what].kind == "ragged all-to-all"
    assert ragged == auto, "on GPUs"
    assert expert_rows(layouts[0])["gather"] * 24 * 3 == gather["rows to experts"].num_bytes, "24 layers, forward twice and backward"


def test_the_table_of_the_embedding_stays():
    """Of the two tables the unembedding alone travels, cut in two by tensor, where rows of gradients are summed instead."""
    plain, tensor = (collectives(layout_of(f"mesh={mesh}")) for mesh in ("{fsdp: 8}", "{fsdp: 4, tensor: 2}"))
    table, tokens = 201088 * 2880, 32 * 4096 // 8
    assert plain["rows of the embedding"].num_bytes == 2 * tokens * 2880 * 2 * 7 // 8 and plain["rows of the embedding"].kind == "all-to-all"
    assert plain["other gradients, float32"].num_bytes > 4 * table * 7 / 8 and "gradients of the last hidden states, float32" not in plain
    assert tensor["gradients of the last hidden states, float32"].num_bytes == 4 * 2 * tokens * 2880
    assert tensor["other gradients, float32"].num_bytes < 4 * table


def test_links_of_a_node_and_network_cards_between_nodes():
    layout = layout_of("mesh={data: 2, fsdp: 4, expert: 2}")
    assert group_rate(layout, H200, ("expert",)) == group_rate(layout, H200, ("fsdp", "expert")) == H200.link_rate
    assert group_rate(layout, H200, ("data",)) == H200.network_rate, "one member in each node, so one card"
    assert group_rate(layout, H200, ("data", "expert")) == 2 * H200.network_rate
    assert group_rate(layout, DEVICES["gb200"], ("data",)) == DEVICES["gb200"].link_rate, "72 are one node"


def test_expert_buffer_is_that_of_the_worst_routing():
    """With expert parallelism all tokens of a group may choose the experts of one device."""
    layout = layout_of("mesh={expert: 8}", "batch.rows=16")
    assert layout.tokens == 8192 and layout.experts == 4 and layout.slots == 8 * 8192 * 4 + 4 * 128


def test_search_lists_what_fits_first_and_every_proposal_can_be_laid_out():
    train = load_config(None, ["model=20b", "batch.rows=8"])
    config, _ = architecture(train.model)
    found = search(config, train, H200, 8, mesh_only=True)
    fits = [candidate.fits(H200) for candidate in found]
    assert any(fits) and fits == sorted(fits, reverse=True)
    rates = [candidate.speed.tokens_per_second_in_turn for candidate in found if candidate.fits(H200)]
    assert rates == sorted(rates, reverse=True)
    for candidate in found[:3]:
        assert candidate.layout.train.mesh.size == 8
        # what the search gives must survive the checks of a config file
        assert parse(candidate.layout.train.to_dict()).mesh == candidate.layout.train.mesh


def test_sixty_four_devices_have_layouts_for_both_releases_though_32_experts_do_not_divide_by_64():
    for model, mesh in (("20b", {"data": 2, "fsdp": 32}), ("20b", {"fsdp": 8, "expert": 4, "context": 1, "data": 2}), ("120b", {"fsdp": 64})):
        layout = layout_of(f"model={model}", f"mesh={json.dumps(mesh)}", "batch.rows=64")
        assert layout.shardings is not None
    with pytest.raises(UsageError, match="dimension 'expert' of size 32 does not divide by fsdp = 64"):
        _ = layout_of("mesh.fsdp=64", "batch.rows=64").shardings


def test_mesh_auto_is_resolved_for_the_devices_present_and_written_as_sizes():
    train = parse({"model": "nano", "mesh": "auto", "batch": {"rows": 8}, "data": {"row_length": 64}})
    assert train.mesh.auto and load_config(None, ["mesh=auto"]).mesh.auto and "mesh: auto" in dump_config(train)
    config, _ = architecture("nano")
    resolved = with_mesh(train, config)
    assert resolved.mesh.size == len(jax.devices()) == 8 and not resolved.mesh.auto
    assert parse(resolved.to_dict()) == resolved
    with pytest.raises(UsageError, match="auto chooses all sizes"):
        parse({"mesh": {"auto": True, "fsdp": 2}})


def test_mesh_auto_that_fits_nowhere_says_what_would():
    train = load_config(None, ["model=20b", "batch.rows=8", "mesh=auto", "remat=none"])
    with pytest.raises(UsageError, match=r"nothing fits on 8 x h100: the smallest is .* GiB of .* GiB per device; .* would fit"):
        proposed_mesh(architecture("20b")[0], train, DEVICES["h100"], 8)
    assert present_device().name == "cpu"


def test_unknown_devices_and_models_are_named_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'h200'"):
        find_device("h20")
    assert find_device("h200", memory=2**36).memory == 2**36
    with pytest.raises(UsageError, match="is not positive"):
        find_device("h200", memory=-1)
    with pytest.raises(UsageError, match="holds none of 20b, 120b"):
        architecture("somebody/some-model")
    assert architecture("runs/sft-120b-64gpu")[0].num_local_experts == 128
    assert architecture(str(NANO))[0] == architecture("nano")[0]


def test_command_prints_tables_or_json(capsys):
    args = ["plan", "model=20b", "batch.rows=8", "mesh.fsdp=8", "--device", "h200", "--show", "3"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("fits", "computed", "estimated", "assumed", "all-gather", "tokens/s", "peak"))
    assert main([*args, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["layout"] == "of the config" and len(values["proposals"]) == 3
    parts = values["memory"]["parts"]
    assert values["memory"]["peak"] == sum(p["bytes"] for p in parts if values["memory"]["peak_phase"] in p["phases"])


# the plan of qlora_qat_20b_24gb.yaml says in its header that it does not fit
RELEASES = sorted(path for names in ("[sq][fa]t*_[0-9]*0b*", "qlora*_80gb") for path in (ROOT / "configs").glob(f"{names}.yaml"))
HEADER = re.compile(r"#\s+gptoss-jax plan --config configs/(\S+) --device (\S+) --devices (\d+)\n")


@pytest.mark.parametrize("path", RELEASES, ids=lambda p: p.name)
def test_configs_of_the_releases_fit_the_hardware_that_they_name(path):
    """The plan in a config's header is the one that the command gives."""
    text = path.read_text()
    commands = HEADER.findall(text)
    assert commands and all(name == path.name for name, _, _ in commands), "a header names its plan command"
    train = load_config(path)
    for _, device, devices in commands:
        card = find_device(device)
        assert train.mesh.size == int(devices)
        candidate = evaluate(Layout(architecture(train.model)[0], train), card)
        assert candidate.fits(card), (device, candidate.memory.peak / 2**30, card.usable / 2**30)
        stated = re.search(rf"{device}: peak ([\d.]+) of ([\d.]+) GiB, ([\d,]+) to ([\d,]+) tokens/s", text)
        assert stated, f"the header states the plan for {device}"
        numbers = [float(n.replace(",", "")) for n in stated.groups()]
        expected = [candidate.memory.peak / 2**30, card.usable / 2**30, candidate.speed.tokens_per_second_in_turn, candidate.speed.tokens_per_second]
        assert numbers == pytest.approx(expected, rel=0.005)
