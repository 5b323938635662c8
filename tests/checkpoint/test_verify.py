"""A good export conforms, the comparison counts and names what differs; faults one by one are in test_mutated_exports.py."""

import numpy as np
import pytest
import torch

from gptoss_jax.checkpoint import load_params, verify_dir
from gptoss_jax.errors import UsageError
from tests.checkpoint import builders
from tests.checkpoint.mutations import EXPERTS, MANIFEST, edit_tensor, flip_bit


def test_a_good_export_conforms(good_export, mxfp4_dir):
    report = verify_dir(good_export, against=mxfp4_dir)
    assert report.ok and [check.status for check in report.checks] == ["ok"] * 12, str(report)
    assert len(list(good_export.glob("*.safetensors"))) == 4


def test_hashes_see_every_fault_of_bytes(directory):
    """A flipped bit passes all conformance checks; only hashes can tell."""
    flip_bit(directory)
    assert [check.title[:2] for check in verify_dir(directory).checks if check.problems] == ["11"]


def test_comparison_names_the_tensor_and_counts_values(directory, mxfp4_dir):
    (directory / MANIFEST).unlink()
    edit_tensor("model.layers.0.self_attn.sinks", lambda t: torch.where(torch.arange(6) == 4, t + 1, t))(directory)
    edit_tensor(EXPERTS + "gate_up_proj_blocks", lambda t: t ^ (torch.arange(t.numel()).reshape(t.shape) == 777).to(torch.uint8) * 8)(directory)
    failures = verify_dir(directory, against=mxfp4_dir).failures
    assert any("'model.layers.0.self_attn.sinks': 1 of 6 values differ, by up to 1" in failure for failure in failures)
    assert any("'model.layers.1.mlp.experts.gate_up_proj': 1 of 98304 values differ" in failure for failure in failures)
    assert sum("values differ" in failure for failure in failures) == 2


def test_comparison_reads_every_layout(good_export, tensors, tmp_path):
    bf16 = builders.write(tmp_path / "bf16", builders.bf16_tensors(tensors), builders.CONFIG)
    openai = builders.write(tmp_path / "openai", builders.openai_tensors(tensors), builders.OPENAI_CONFIG)
    for origin in (bf16, openai):
        assert verify_dir(good_export, against=origin).ok
    for directory in (bf16, openai):
        assert verify_dir(directory, against=good_export).failures == [
            f"10 weights as expected: {name} is not that of {good_export}"
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
        ]
    assert [check.status for check in verify_dir(openai).checks if check.title[0] in "789"] == ["-", "-", "-"]


def test_models_of_other_shape_are_not_compared(good_export, tensors, tmp_path):
    other = builders.write(tmp_path, tensors, {**builders.CONFIG, "quantization_config": builders.QUANTIZATION, "sliding_window": 8})
    (failure,) = verify_dir(good_export, against=other).failures
    assert "the models differ" in failure


def test_places_that_hold_no_model(tmp_path, good_export):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UsageError):
            verify_dir(place)
        with pytest.raises(UsageError):
            verify_dir(good_export, against=place)


def test_zero_blocks_may_have_any_legal_scale(directory):
    (directory / MANIFEST).unlink()
    for byte in (0, 252):
        edit_tensor(EXPERTS + "down_proj_blocks", torch.zeros_like)(directory)
        edit_tensor(EXPERTS + "down_proj_scales", lambda t, byte=byte: torch.full_like(t, byte))(directory)
        assert verify_dir(directory).ok
        assert np.all(np.asarray(load_params(directory)[1]["blocks.1.mlp.experts.down_proj"]) == 0)
