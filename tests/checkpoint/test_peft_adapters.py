"""Adapters in PEFT's layout: there and back, and against `peft` itself where it is installed."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint import export_hf
from gptoss_jax.checkpoint.models import load_model, look_at
from gptoss_jax.checkpoint.peft_adapters import ADAPTER_CONFIG, ADAPTER_MODEL, read_peft, write_peft
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.model import compute_logits, forward
from gptoss_jax.model.lora import LoraSpec, abstract_adapters, attach, layer_mask
from tests.support.params import lively_params

BOTH = ("gate_up_proj", "down_proj")
SPECS = {
    "all": LoraSpec(rank=3, alpha=5.0),
    "some layers": LoraSpec(rank=2, alpha=3.0, rslora=True, targets=("q_proj", "o_proj", *BOTH), expert_layers=(1, 2)),
    "gate_up alone": LoraSpec(rank=2, targets=("gate_up_proj",)),
    "down alone": LoraSpec(rank=2, targets=("k_proj", "down_proj")),
}


def adapters_of(config, spec, seed=0):
    """Random, but zero in layers that are left out, as training leaves them."""
    out, rng = {}, np.random.default_rng(seed)
    for name, leaf in abstract_adapters(config, spec).items():
        mask = layer_mask(config, spec, name.rpartition(".lora_")[0])
        out[name] = jnp.asarray(0.3 * rng.standard_normal(leaf.shape) * (1 if mask is None else mask), jnp.float32)
    return out


@pytest.mark.parametrize("name", SPECS)
def test_written_adapters_are_read_back(name, tiny_config, tmp_path):
    spec, adapters = SPECS[name], adapters_of(tiny_config, SPECS[name])
    directory = write_peft(tmp_path / "peft", tiny_config, spec, adapters, "base")
    found, read = read_peft(directory, tiny_config)
    assert (found.rank, found.alpha, found.rslora, set(found.targets), found.expert_layers) == (
        spec.rank, spec.alpha, spec.rslora, set(spec.targets), spec.expert_layers
    )  # fmt: skip
    assert read.keys() == adapters.keys()
    for key in adapters:
        np.testing.assert_array_equal(read[key], adapters[key], err_msg=key)


def test_experts_have_the_order_of_the_layout(tiny_config, tmp_path):
    spec = SPECS["all"]
    adapters = adapters_of(tiny_config, spec)
    file = SafetensorsFile(write_peft(tmp_path / "peft", tiny_config, spec, adapters, "base") / ADAPTER_MODEL)
    experts = tiny_config.num_local_experts
    key = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_{}.weight"  # inner: gate_up_proj of layer 1, in our stack blocks.1
    a, b = (file.array(key.format(which)) for which in "AB")
    for expert in (0, 5):
        ours = [np.asarray(adapters[f"blocks.1.mlp.experts.gate_up_proj.lora_{which}"][0, expert]) for which in "ab"]
        np.testing.assert_array_equal(a.reshape(experts, spec.rank, -1)[expert], ours[0])
        np.testing.assert_array_equal(b.reshape(-1, spec.rank, experts)[:, :, expert], ours[1])


def test_what_cannot_be_read_is_refused(tiny_config, tmp_path):
    directory = write_peft(tmp_path / "peft", tiny_config, SPECS["all"], adapters_of(tiny_config, SPECS["all"]), "base")
    raw = json.loads((directory / ADAPTER_CONFIG).read_text())
    (directory / ADAPTER_CONFIG).write_text(json.dumps({**raw, "use_dora": True}))
    with pytest.raises(UsageError, match="use_dora = true is not known"):
        read_peft(directory, tiny_config)
    (directory / ADAPTER_CONFIG).write_text(json.dumps({**raw, "r": 4}))
    with pytest.raises(CorruptError, match="lora_A has shape"):
        read_peft(directory, tiny_config)


def test_a_directory_of_adapters_is_a_model(tiny_config, tmp_path):
    base = export_hf(tmp_path / "base", tiny_config, lively_params(tiny_config), format="bf16")
    spec, adapters = SPECS["all"], adapters_of(tiny_config, SPECS["all"])
    directory = write_peft(tmp_path / "peft", tiny_config, spec, adapters, str(base))
    assert look_at(directory)[0] == look_at(base)[0]
    plain, merged = load_model(base, jnp.float32).params, load_model(directory, jnp.float32).params
    name = "blocks.0.mlp.experts.down_proj"
    change = spec.scale * jnp.einsum("leor,leri->leoi", adapters[f"{name}.lora_b"], adapters[f"{name}.lora_a"])
    np.testing.assert_allclose(merged[name] - plain[name], change, atol=2e-3 * np.abs(change).max())


@pytest.mark.parametrize("name", SPECS)
def test_peft_computes_the_same_logits_and_its_own_adapters_are_read(name, tiny_config, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install '.[test]')")
    torch = pytest.importorskip("torch")
    from tests.support.torch_model import hf_model

    spec, params = SPECS[name], lively_params(tiny_config)
    adapters = adapters_of(tiny_config, spec)
    tokens = np.random.default_rng(0).integers(0, tiny_config.vocab_size, (2, 11)).astype(np.int32)

    def ours(spec, adapters):
        joined = attach(tiny_config, spec, {**params, **adapters})
        run = jax.jit(lambda joined: compute_logits(joined, forward(tiny_config, joined, tokens, dtype=jnp.float32).hidden_BTD))
        return np.asarray(run(joined))

    directory = write_peft(tmp_path / "peft", tiny_config, spec, adapters, "base")
    model = peft.PeftModel.from_pretrained(hf_model(tiny_config, params), directory).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    plain = np.asarray(compute_logits(params, forward(tiny_config, params, tokens, dtype=jnp.float32).hidden_BTD))
    got = ours(spec, adapters)
    assert np.abs(got - plain).max() > 0.01 * np.abs(plain).max(), "the adapters must matter"
    np.testing.assert_allclose(got, theirs, atol=1e-4 * np.abs(theirs).max())

    # back: adapters of peft's own making, all of them random
    settings = peft.LoraConfig.from_pretrained(directory)
    settings.base_model_name_or_path = None  # a model made here has no name
    own = peft.get_peft_model(hf_model(tiny_config, params), settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in own.named_parameters():
            if "lora_" in key:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        theirs = own(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    own.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    np.testing.assert_allclose(ours(*read_peft(tmp_path / "own", tiny_config)), theirs, atol=1e-4 * np.abs(theirs).max())
