"""Adapters in training: gradients of the whole model against dense weights, and a run from packed codes through checkpoint, resume and export."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gptoss_jax.checkpoint import export_hf, open_checkpoint, orbax_store, verify_dir
from gptoss_jax.checkpoint.models import load_base, load_model, lora_record
from gptoss_jax.checkpoint.peft_adapters import read_peft
from gptoss_jax.cli import main
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.formats import Mxfp4, mxfp4
from gptoss_jax.model import init_params
from gptoss_jax.model.inference import prepare_params
from gptoss_jax.model.lora import LoraSpec, abstract_adapters, adapted_weights, adapter_name, attach, is_adapter
from gptoss_jax.quant import LoraWeight, default_policy, make_expert_quant, merged_weight
from gptoss_jax.training.config import parse
from gptoss_jax.training.console import Progress
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import RunDir
from gptoss_jax.training.step import make_loss
from tests.training.support import CONFIG, Batches, bits, make_params, make_train

SPEC = LoraSpec(rank=3, alpha=4.0, rslora=True, expert_layers=(1,))
LORA = {"rank": 3, "alpha": 4.0, "rslora": True, "expert_layers": [1], "base": "float32"}


def lively_adapters(spec, seed=5):
    """Both factors random, so that nothing vanishes."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32) for name, x in abstract_adapters(CONFIG, spec).items()}


@pytest.mark.parametrize("fmt", [None, "mxfp4"])
def test_gradients_of_adapters_equal_those_through_dense_weights(fmt):
    """Attention and experts, in the layers that are adapted; those left out receive none."""
    base, adapters, batch = make_params(), lively_adapters(SPEC), next(Batches())
    expert_quant = make_expert_quant(fmt and default_policy(fmt), jnp.float32)
    train = make_train(lora=LORA)

    def dense(adapters):
        joined = attach(CONFIG, SPEC, {**base, **adapters})
        out = dict(base)
        for name in adapted_weights(CONFIG, SPEC):
            w = joined[name]
            product = w.base + w.scale * jnp.einsum("...or,...ri->...oi", w.b, w.a)
            if fmt is not None and ".experts." in name:
                # through a format the bits must be those of the merged weight; its gradient is the product's
                product = jax.lax.stop_gradient(merged_weight(w)) + (product - jax.lax.stop_gradient(product))
            out[name] = product
        return out

    ours = make_loss(CONFIG, train, expert_quant)
    plain = make_loss(CONFIG, make_train(), expert_quant)
    got = jax.jit(jax.value_and_grad(lambda a: ours(a, base, batch, 50.0, 100.0)[0]))(adapters)
    want = jax.jit(jax.value_and_grad(lambda a: plain(dense(a), {}, batch, 50.0, 100.0)[0]))(adapters)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name in adapters:
        np.testing.assert_allclose(got[1][name], want[1][name], atol=1e-5 * np.abs(want[1][name]).max(), rtol=1e-4, err_msg=name)
        if ".experts." in name:
            assert not np.any(got[1][name][0]) and np.any(got[1][name][1]), f"{name}: layer 1 alone is adapted"


def test_targets_are_checked_and_named():
    every = {adapter_name(name).rpartition(".")[2] for name in adapted_weights(CONFIG, LoraSpec())}
    assert every == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert list(adapted_weights(CONFIG, LoraSpec(targets=("mlp.experts.down_proj",)))) == ["blocks.0.mlp.experts.down_proj"]
    with pytest.raises(ValueError, match="target 'gate_proj' is no projection .* nearest is 'gate_up_proj'"):
        adapted_weights(CONFIG, LoraSpec(targets=("gate_proj",)))
    with pytest.raises(ValueError, match=r"expert_layers = \[2\]: layers are 0 to 1"):
        adapted_weights(CONFIG, LoraSpec(expert_layers=(2,)))
    assert LoraSpec(rank=4, alpha=8, rslora=True).scale == 4 and LoraSpec(rank=4, alpha=8).scale == 2
    for raw, message in (
        ({"master_dtype": "bfloat16", "lora": {}}, "adapters are float32"),
        ({"mesh": {"fsdp": 2}, "lora": {}}, "one device"),
        ({"lora": {}, "quant": {"format": "mxfp4", "estimator": "dge"}}, "straight-through"),
        ({"lora": {"ranks": 3}}, "did you mean 'lora.rank'"),
    ):
        with pytest.raises(UsageError, match=message):
            parse(raw)


# ---- a run ----------------------------------------------------------------------------------------------------------------------

TRAIN = make_train(
    steps=2, checkpoint_every=1, compute_dtype="bfloat16", lora={"rank": 3, "targets": ["q_proj", "gate_up_proj"], "base": "mxfp4"},
    quant={"format": "mxfp4"}, optimizer={"learning_rate": 0.02},
)  # fmt: skip
POLICY = default_policy(Mxfp4())


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    return export_hf(tmp_path_factory.mktemp("base") / "mxfp4", CONFIG, init_params(CONFIG, jax.random.key(0)), format="mxfp4")


def run(path, base_dir, resume=False):
    with RunDir(path, resume=resume, overwrite=False) as directory:
        progress = Progress(TRAIN.steps, Console(file=io.StringIO(), width=200))
        trainer = Trainer(CONFIG, TRAIN, directory, Batches(), policy=POLICY, progress=progress)
        base = load_base(base_dir, TRAIN.lora.base)
        source = {"lora": lora_record(TRAIN.lora.spec, TRAIN.lora.base, str(base_dir), base.params)}
        if not resume or trainer.resume(base.params, source) is None:
            trainer.start(base.params, source=source, donate=True)
        trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def finished(base_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "out"
    return path, run(path, base_dir)


def test_the_base_stays_packed_and_as_it_was_and_checkpoints_hold_adapters_alone(finished, base_dir, tmp_path):
    path, trainer = finished
    before = load_base(base_dir, "mxfp4").params
    for name, value in before.items():
        assert bits(trainer.state.params[name]) == bits(value), name
    assert isinstance(trainer.state.params["blocks.0.mlp.experts.down_proj"], mxfp4.Codes)
    saved = orbax_store.restore_params(path / "checkpoints", 2)
    assert saved and all(map(is_adapter, saved))
    assert all(np.any(x) for x in saved.values()), "every adapter has moved off zero"
    assert main(["export", str(path), str(tmp_path / "peft"), "--format", "peft"]) == 0
    spec, read = read_peft(tmp_path / "peft", CONFIG)
    assert (spec.rank, set(spec.targets)) == (3, {"q_proj", "gate_up_proj"})
    assert bits(read) == bits(saved)


def test_resumed_run_equals_the_unbroken_one(finished, base_dir):
    path, trainer = finished
    orbax_store.quarantine(path / "checkpoints", 2)
    assert bits(run(path, base_dir, resume=True).state) == bits(trainer.state)


def test_export_holds_the_codes_that_training_computed(finished, tmp_path):
    """Also of a projection without adapters, whose base is packed; merged before the export or while it is written."""
    path, _ = finished
    model = load_model(path, jnp.bfloat16, apart=True)
    assert isinstance(model.params["blocks.0.mlp.experts.gate_up_proj"], LoraWeight) and len(model.code_hashes) == 4
    directory = export_hf(tmp_path / "apart", CONFIG, model.params, format=Mxfp4())
    assert verify_dir(directory, against=model.code_hashes).ok
    merged = load_model(path, jnp.bfloat16)
    again = export_hf(tmp_path / "merged", CONFIG, merged.params, format=Mxfp4())
    assert (again / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    name = "blocks.0.mlp.experts.gate_up_proj"
    without = {**model.params, name: LoraWeight(model.params[name].base, None, None)}
    without = export_hf(tmp_path / "without", CONFIG, without, format=Mxfp4())
    assert not verify_dir(without, against=model.code_hashes).ok, "adapters must change the codes"


def test_generation_runs_on_codes_of_the_merged_weight(finished):
    path, _ = finished
    model = load_model(path, jnp.bfloat16, apart=True)
    prepared = prepare_params(model.params, jnp.bfloat16, model.expert_quant(jnp.dtype(jnp.bfloat16)))
    merged = load_model(path, jnp.bfloat16).params
    for projection in ("gate_up_proj", "down_proj"):
        name = f"blocks.0.mlp.experts.{projection}"
        jax.tree.map(np.testing.assert_array_equal, prepared[name], mxfp4.encode(merged[name]))
    same = prepare_params(merged, jnp.bfloat16)["blocks.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(prepared["blocks.0.self_attn.q_proj.weight"], same)


def test_another_base_is_refused(finished, base_dir, tmp_path):
    path, _ = finished
    where = open_checkpoint(base_dir).path
    moved = where.rename(tmp_path / "moved")
    try:
        with pytest.raises(UsageError, match="holds adapters of .*, which cannot be read"):
            load_model(path, jnp.bfloat16)
        export_hf(where, CONFIG, init_params(CONFIG, jax.random.key(1)), format="mxfp4")
        with pytest.raises(CorruptError, match="another model now"):
            load_model(path, jnp.bfloat16)
        with RunDir(path, resume=True, overwrite=False) as directory:
            trainer = Trainer(CONFIG, TRAIN, directory, Batches(), policy=POLICY)
            base = load_base(where, "mxfp4")
            with pytest.raises(UsageError, match="adapters of another model"):
                trainer.resume(base.params, {"lora": lora_record(TRAIN.lora.spec, "mxfp4", str(where), base.params)})
    finally:
        import shutil

        shutil.rmtree(where, ignore_errors=True)
        moved.rename(where)
