"""The step: one loss however the batch is cut, nothing moved by a non-finite update, and the quantized weights that the program really uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.formats import Mxfp4
from gptoss_jax.model import abstract_params
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import batch_sharding, make_mesh, param_shardings, replicated
from gptoss_jax.training.step import Shardings, init_state, make_capture_step, make_eval_step, make_train_step
from tests.training.support import CONFIG, LENGTH, ROWS, bits, document, make_params, make_train, pack

RTOL = 1e-5  # float32, of the largest gradient of each parameter: orders of summation differ
EXPERT_QUANT = make_expert_quant(default_policy(Mxfp4()), jnp.float32)


@functools.cache
def documents():
    """Lengths below and above the window of 5, one with a single trained token."""
    rng = np.random.default_rng(5)
    lengths = [LENGTH, 9, 3, LENGTH, 4, 7, 5, 12]
    docs = [document(rng, n) for n in lengths]
    docs[3] = (docs[3][0], np.eye(1, LENGTH, 6, dtype=np.float32)[0])
    return docs


@functools.cache
def packed_batch():
    d = documents()
    return pack([[d[0]], [d[1], d[2], d[4]], [d[3]], [d[7]], [d[5], d[6]], [], [], []])


@functools.cache
def unpacked_batch():
    return pack([[d] for d in documents()])


@functools.cache
def compiled(accumulation: int = 1):
    return make_train_step(CONFIG, train_of(accumulation))


def train_of(accumulation: int = 1, master: str = "float32", **changes):
    return make_train(batch={"rows": ROWS, "accumulation": accumulation}, master_dtype=master, **changes)


def first_moments(state) -> dict[str, np.ndarray]:
    """Gradients of a first step, out of Adam's first moment (0.1 * gradient)."""
    adam = next(s for s in state.opt_state if isinstance(s, optax.ScaleByAdamState))
    return {name: np.asarray(mu) / 0.1 for name, mu in adam.mu.items()}


def gradients(accumulation, batch):
    state, metrics = compiled(accumulation)(init_state(CONFIG, train_of(accumulation), make_params()), batch)
    return first_moments(state), jax.device_get(metrics)


def assert_same(new, reference):
    for name, expected in reference[0].items():
        np.testing.assert_allclose(new[0][name], expected, atol=RTOL * np.abs(expected).max(), rtol=0, err_msg=name)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(new[1][key], reference[1][key], rtol=RTOL, err_msg=key)
    assert new[1]["trained_tokens"] == reference[1]["trained_tokens"] and new[1]["tokens"] == reference[1]["tokens"]


@pytest.fixture(scope="module")
def reference():
    return gradients(1, packed_batch())


@pytest.mark.parametrize("changes", [{"remat": "none"}, {"remat": "products"}, {"cast_at": "step"}], ids=str)
def test_what_is_kept_or_made_early_changes_no_gradient(changes, reference):
    train = train_of(**changes)
    state, metrics = make_train_step(CONFIG, train)(init_state(CONFIG, train, make_params()), packed_batch())
    assert_same((first_moments(state), jax.device_get(metrics)), reference)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_codes_and_gradients_are_the_same_cast_per_layer_and_per_step(accumulation):
    captured, states = [], []
    for cast_at in ("layer", "step"):
        train = train_of(accumulation, cast_at=cast_at)
        state = init_state(CONFIG, train, make_params())
        captured.append(make_capture_step(CONFIG, train, EXPERT_QUANT)(state, packed_batch()))
        states.append(first_moments(make_train_step(CONFIG, train, EXPERT_QUANT)(state, packed_batch())[0]))
    assert captured[0].codes.keys() == captured[1].codes.keys() and captured[0].codes
    assert bits(captured[0].codes) == bits(captured[1].codes) and bits(captured[0].weights) == bits(captured[1].weights)
    for name, expected in states[0].items():
        np.testing.assert_allclose(states[1][name], expected, atol=RTOL * np.abs(expected).max(), rtol=0, err_msg=name)


def test_gradients_are_the_same_for_any_accumulation(reference):
    """Rows have 0 to 13 trained tokens, 3 have none, so a mean of the means of microbatches would differ by far more."""
    assert_same(gradients(4, packed_batch()), reference)


def test_gradients_are_the_same_for_any_packing(reference):
    assert_same(gradients(1, unpacked_batch()), reference)


@pytest.mark.slow
def test_gradients_and_evaluation_are_the_same_on_a_mesh(reference):
    mesh = make_mesh(data=2, fsdp=2)
    shardings = Shardings(param_shardings(CONFIG, mesh), batch_sharding(mesh), replicated(mesh))
    train = train_of(2, mesh={"data": 2, "fsdp": 2})
    batch = jax.device_put(unpacked_batch(), shardings.batch)
    state = init_state(CONFIG, train, make_params(), shardings)
    total, weight = make_eval_step(CONFIG, train, None, shardings)(state.params, batch)
    np.testing.assert_allclose(total / weight, reference[1]["loss"], rtol=RTOL)
    state, metrics = make_train_step(CONFIG, train, None, shardings)(state, batch)
    assert_same((first_moments(state), jax.device_get(metrics)), reference)
    name = "blocks.0.mlp.experts.gate_up_proj"
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state) if jax.tree_util.keystr(path).endswith(f"{name}']")]
    assert len(moments) == 2 and {leaf.sharding for leaf in (state.params[name], *moments)} == {shardings.params[name]}


def test_loss_is_the_mean_over_trained_tokens(reference):
    total, weight = make_eval_step(CONFIG, train_of())(make_params(), packed_batch())
    assert weight == packed_batch().loss_weights_BT.sum()
    np.testing.assert_allclose(total / weight, reference[1]["loss"], rtol=RTOL)


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_non_finite_update_is_left_out_and_counted(master):
    # the rounding of every parameter takes long to compile: one is enough
    train = train_of() if master == "float32" else train_of(1, master, freeze=["blocks.*", "embed_tokens.weight", "lm_head.weight"])
    step = compiled() if master == "float32" else make_train_step(CONFIG, train)
    good, bad = packed_batch(), packed_batch()._replace(loss_weights_BT=packed_batch().loss_weights_BT.copy())
    bad.loss_weights_BT[0, 0] = np.inf
    state, _ = step(init_state(CONFIG, train, make_params()), good)
    before = bits((state.params, state.opt_state))
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert (metrics["skipped"], metrics["skipped_in_row"], state.skipped) == (1, count, count)
        assert bits((state.params, state.opt_state)) == before
    assert state.step == 3
    state, metrics = step(state, good)
    assert (metrics["skipped"], metrics["skipped_in_row"], state.skipped) == (0, 0, 2)
    assert bits(state.params) != before and all(np.isfinite(p.astype(jnp.float32)).all() for p in state.params.values())
    assert {p.dtype.name for p in state.params.values()} == {master}


def test_batch_without_trained_tokens_has_loss_zero():
    empty = packed_batch()._replace(loss_weights_BT=np.zeros_like(packed_batch().loss_weights_BT))
    _, metrics = compiled()(init_state(CONFIG, train_of(), make_params()), empty)
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped"]) == (0, 0, 0)


def test_init_state_leaves_the_given_parameters_alone():
    params = make_params()
    state = init_state(CONFIG, train_of(), params)
    compiled()(state, packed_batch())
    assert bits(params) == bits(make_params())


def test_frozen_parameters_stay_and_auxiliary_loss_reaches_the_router(reference):
    train = train_of(freeze=["*.self_attn.*", "lm_head.weight"], router_aux_loss_coef=0.5)
    state, metrics = make_train_step(CONFIG, train)(init_state(CONFIG, train, make_params()), packed_batch())
    before, after = bits(make_params()), bits(state.params)
    moved = {name for name in before if before[name] != after[name]}
    assert moved == {f"['{n}']" for n in abstract_params(CONFIG) if ".self_attn." not in n and n != "lm_head.weight"}
    # a uniform router has k; the reported loss does not include it
    assert reference[1]["aux_loss"] == 0 and metrics["aux_loss"] >= CONFIG.num_experts_per_tok
    np.testing.assert_allclose(metrics["loss"], reference[1]["loss"], rtol=RTOL)
    router = "blocks.0.mlp.router.weight"
    assert np.abs(first_moments(state)[router] - reference[0][router]).max() > 1e-3


def test_captured_weights_are_those_of_the_step_and_the_decoded_codes():
    """Same loss and gradient norm as the training step on that state, and the decoded codes of its masters; also out of a scan over microbatches."""
    train = train_of(2)
    state = init_state(CONFIG, train, make_params())
    captured = make_capture_step(CONFIG, train, EXPERT_QUANT)(state, packed_batch())
    alone = make_capture_step(CONFIG, train, EXPERT_QUANT, weights=False)(state, packed_batch())
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), alone.codes, captured.codes)) and not alone.weights
    names = {f"blocks.0.mlp.experts.{p}" for p in ("gate_up_proj", "down_proj")}
    assert captured.weights.keys() == captured.codes.keys() == names
    for name in names:
        decoded = Mxfp4().decode(captured.codes[name], jnp.float32)
        np.testing.assert_array_equal(captured.weights[name], decoded)
        np.testing.assert_array_equal(decoded, Mxfp4().decode(Mxfp4().encode(state.params[name]), jnp.float32))
        assert (np.asarray(decoded) != np.asarray(state.params[name])).mean() > 0.5
    _, metrics = make_train_step(CONFIG, train_of(), EXPERT_QUANT)(state, packed_batch())
    np.testing.assert_allclose((captured.loss, captured.grad_norm), (metrics["loss"], metrics["grad_norm"]), rtol=RTOL)


def test_evaluation_of_a_quantized_run_sees_the_quantized_weights():
    train, params = train_of(), make_params()
    fake = {n: Mxfp4().decode(Mxfp4().encode(p), jnp.float32) if n.endswith(("gate_up_proj", "down_proj")) else p for n, p in params.items()}
    quantized = make_eval_step(CONFIG, train, EXPERT_QUANT)(params, packed_batch())[0]
    plain = make_eval_step(CONFIG, train)
    np.testing.assert_allclose(quantized, plain(fake, packed_batch())[0], rtol=1e-6)
    assert abs(quantized - plain(params, packed_batch())[0]) > 1e-3


@pytest.mark.parametrize("cast_at", ["layer", "step"])
def test_backward_weight_and_activations_reach_the_step(cast_at):
    """The gradient of the last layer's weights does not pass through experts, that of the embedding does; rounded inputs change the loss."""
    from gptoss_jax.formats import Mxfp8
    from gptoss_jax.quant import QuantPolicy

    train, rules = train_of(cast_at=cast_at), default_policy(Mxfp4()).rules
    run = lambda **options: make_train_step(CONFIG, train, make_expert_quant(QuantPolicy(rules, **options), jnp.float32))(
        init_state(CONFIG, train, make_params()), packed_batch()
    )
    (plain, metrics), (original, same_metrics), (_, rounded) = run(), run(backward_weight="original"), run(activations=Mxfp8())
    np.testing.assert_allclose(same_metrics["loss"], metrics["loss"], rtol=1e-6)
    moments, other = first_moments(plain), first_moments(original)
    np.testing.assert_allclose(other["lm_head.weight"], moments["lm_head.weight"], atol=1e-6 * np.abs(moments["lm_head.weight"]).max())
    difference = np.abs(other["embed_tokens.weight"] - moments["embed_tokens.weight"]).max()
    assert difference > 1e-3 * np.abs(moments["embed_tokens.weight"]).max()
    assert 1e-6 < abs(float(rounded["loss"] / metrics["loss"]) - 1) < 1e-2
