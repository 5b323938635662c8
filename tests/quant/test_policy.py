"""The policy selects exactly what it says, and the callable of the model does what the policy says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.formats import Mxfp4, Mxfp8, Nvfp4, mxfp4, nvfp4
from gptoss_jax.quant import QuantPolicy, default_policy, fake_quant_with_codes, make_expert_quant


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


PARAMS = {
    "embed_tokens.weight": shape(160, 96),
    "blocks.0.self_attn.q_proj.weight": shape(1, 120, 96),
    "blocks.0.mlp.router.weight": shape(1, 8, 96),
    "blocks.0.mlp.experts.gate_up_proj": shape(1, 8, 128, 96),
    "blocks.0.mlp.experts.gate_up_proj_bias": shape(1, 8, 128),
    "blocks.0.mlp.experts.down_proj": shape(1, 8, 96, 64),
    "blocks.0.mlp.experts.down_proj_bias": shape(1, 8, 96),
    "tail.0.mlp.experts.gate_up_proj": shape(8, 128, 96),
    "tail.0.mlp.experts.down_proj": shape(8, 96, 64),
}
EXPERTS = [name for name in PARAMS if "experts" in name and not name.endswith("_bias")]


def test_default_policy_selects_the_expert_projections_and_nothing_else():
    matched = default_policy("nvfp4").match(PARAMS)
    assert list(matched) == EXPERTS and set(matched.values()) == {Nvfp4("pow2")}


def test_first_matching_rule_decides():
    policy = QuantPolicy((("*.down_proj", Mxfp4("even")), ("*.mlp.experts.*_proj", "nvfp4")))
    assert policy.match(PARAMS) == {name: Mxfp4("even") if name.endswith("down_proj") else Nvfp4() for name in EXPERTS}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.mlp.expert.*_proj", r"'\*\.mlp\.expert\.\*_proj' matches no parameter; nearest names: .*blocks\.0\.mlp\.experts\.\w+_proj"),
        ("*.mlp.experts.*_proj", "never decides: earlier rules"),
    ],
)
def test_a_rule_that_decides_nothing_is_an_error(pattern, message):
    policy = QuantPolicy((("*.mlp.experts.*_proj", "mxfp4"), (pattern, "nvfp4")))
    with pytest.raises(ValueError, match=message):
        policy.match(PARAMS)
    with pytest.raises(ValueError):
        policy.describe(PARAMS)


def test_a_parameter_that_cannot_be_encoded_is_an_error_with_its_name():
    with pytest.raises(ValueError, match=r"tail\.0\.mlp\.experts\.down_proj \(8, 96, 48\) cannot be mxfp4.*32"):
        default_policy("mxfp4").match(PARAMS | {"tail.0.mlp.experts.down_proj": shape(8, 96, 48)})
    with pytest.raises(ValueError, match=r"down_proj is float16"):
        default_policy("mxfp4").match(PARAMS | {"tail.0.mlp.experts.down_proj": shape(8, 96, 64, dtype=jnp.float16)})
    with pytest.raises(ValueError, match="at least one rule"):
        QuantPolicy(())


def test_describe_names_every_quantized_array():
    text = default_policy(Mxfp4("even")).describe(PARAMS)
    lines = text.splitlines()
    assert lines[0].split() == ["parameter", "shape", "format", "blocks", "along"]
    assert lines[1] == "blocks.0.mlp.experts.gate_up_proj  1x8x128x96  mxfp4(scale_rule=even)  dim 3: 96 / 32"
    assert [line.split()[0] for line in lines[1:-1]] == EXPERTS
    assert lines[-1].startswith("4 of 9 arrays quantized: 294,912 of ")


def test_dict_round_trip_through_json():
    policy = QuantPolicy((("*.down_proj", Mxfp4(compat="modelopt")), ("*.gate_up_proj", Nvfp4("exact"))))
    assert QuantPolicy.from_dict(json.loads(json.dumps(policy.to_dict()))) == policy
    with pytest.raises(ValueError, match="rule"):
        QuantPolicy.from_dict({"rule": []})
    with pytest.raises(ValueError, match="pattern"):
        QuantPolicy.from_dict({"rules": [{"name": "x", "format": {"name": "mxfp4"}}]})


def test_expert_quant_without_policy_is_the_cast():
    x = np.random.default_rng(51).standard_normal((2, 4, 32)).astype(np.float32)
    w, codes = make_expert_quant(None, jnp.bfloat16)("down_proj", jnp.asarray(x))
    assert codes is None and w.dtype == jnp.bfloat16
    np.testing.assert_array_equal(w, x.astype(jnp.bfloat16))


def test_expert_quant_encodes_the_stored_weight_and_not_its_cast():
    x = jnp.asarray(np.random.default_rng(52).standard_normal((2, 32, 128)), jnp.float32)
    expert_quant = make_expert_quant(QuantPolicy((("*.gate_up_proj", Mxfp4("even")), ("*.down_proj", "nvfp4"))), jnp.bfloat16)
    w, codes = expert_quant("gate_up_proj", x)
    expected_w, expected_codes = fake_quant_with_codes(x, Mxfp4("even"), dtype=jnp.bfloat16)
    assert w.dtype == jnp.bfloat16 and w.tobytes() == expected_w.tobytes() and codes.packed.tobytes() == expected_codes.packed.tobytes()
    of_the_cast = np.asarray(mxfp4.encode(x.astype(jnp.bfloat16), "even").packed)
    assert 0.001 < (of_the_cast != np.asarray(codes.packed)).mean()
    assert expert_quant("down_proj", x)[0].tobytes() == nvfp4.decode(nvfp4.encode(x)).tobytes()


def test_expert_quant_leaves_a_projection_without_rule_as_it_is():
    x = jnp.ones((2, 4, 32))
    assert make_expert_quant(QuantPolicy((("*.down_proj", "mxfp4"),)), jnp.float32)("gate_up_proj", x)[1] is None


@pytest.mark.parametrize("pattern", ["blocks.1.mlp.experts.down_proj", "*.self_attn.q_proj.weight"])
def test_expert_quant_refuses_what_it_cannot_carry_out(pattern):
    with pytest.raises(ValueError, match="does not cover an expert projection in every layer"):
        make_expert_quant(QuantPolicy((("*.down_proj", "mxfp4"), (pattern, "mxfp4"))), jnp.float32)


UNTRAINABLE = [(Mxfp4(element_round="sr", seed=1), "other weights every time"), (Mxfp4(block=64), "blocks of 32"), (Mxfp8(), "MXFP8")]


@pytest.mark.parametrize(("fmt", "reason"), UNTRAINABLE, ids=str)
def test_training_refuses_what_an_export_would_not_hold(fmt, reason):
    with pytest.raises(ValueError, match=f"QAT trains the weights that an export holds, but .*{reason}"):
        make_expert_quant(default_policy(fmt), jnp.bfloat16)
