"""Exports with one fault each, of the kinds that some client takes in silence or fails on without saying why: `verify` refuses every one, under
the title of the demand that it breaks and under no other, and says what is wrong.

What the clients do with each was found by running transformers 5.23, llama.cpp's converter and OpenAI's reference, and by reading vLLM 0.33,
SGLang 0.5.23 and TensorRT-LLM.
"""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptoss_jax.checkpoint import verify_dir
from gptoss_jax.formats import Mxfp4, mxfp4
from tests.checkpoint import mutations as m
from tests.checkpoint.test_load import with_byte

HEAD, FIRST = "lm_head.weight", "model.embed_tokens.weight"  # in the last shard and in the first
NORM = "model.norm.weight"
DOWN, GATE_UP = m.EXPERTS + "down_proj", m.EXPERTS + "gate_up_proj"


def shift(header, key=HEAD, by=8):
    header[key]["data_offsets"] = [offset + by for offset in header[key]["data_offsets"]]


def wrong_shard(index):
    index["weight_map"][HEAD] = index["weight_map"][FIRST]


def narrow_experts(directory):
    """The whole model with 48 expert features, which blocks of 32 do not divide."""
    for layer in range(3):
        experts = f"model.layers.{layer}.mlp.experts."
        for key in ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias"):
            m.edit_tensor(experts + key, lambda t: t[:, :96].contiguous())(directory)
        for key in ("down_proj_blocks", "down_proj_scales"):
            m.edit_tensor(experts + key, lambda t: t[:, :, :1].contiguous())(directory)
    m.edit_config(intermediate_size=48)(directory)


# fault: (how, title of the check, words of the message). The comment before a group says what clients do with it.
FAULTS = {
    # transformers initialises what is missing at random and calls that a success; TensorRT-LLM ends with a bare KeyError; SGLang leaves missing
    # scales at 1; everyone skips what is too much
    "missing tensor": (m.drop(DOWN + "_bias"), "1 tensors", "missing 'model.layers.1.mlp.experts.down_proj_bias'"),
    "no sinks": (m.drop("model.layers.2.self_attn.sinks"), "1 tensors", "missing 'model.layers.2.self_attn.sinks' [6]"),
    "no head": (m.drop(HEAD), "1 tensors", "missing 'lm_head.weight' [160, 96]"),
    "no scales": (m.drop(DOWN + "_scales"), "1 tensors", "missing 'model.layers.1.mlp.experts.down_proj_scales' [8, 96, 2]"),
    "no blocks": (m.drop(DOWN + "_blocks"), "1 tensors", "missing 'model.layers.1.mlp.experts.down_proj_blocks' [8, 96, 2, 16]"),
    "a projection missing": (m.drop(GATE_UP + "_blocks", GATE_UP + "_scales"), "1 tensors", "gate_up_proj_blocks"),
    "extra tensor": (m.add("model.layers.3.self_attn.sinks", torch.zeros(6)), "1 tensors", "extra 'model.layers.3.self_attn.sinks' [6]"),
    "misshapen tensor": (m.edit_tensor("model.norm.weight", lambda t: t[:5].clone()), "1 tensors", "has shape [5], expected [96]"),
    "transposed head": (m.edit_tensor(HEAD, lambda t: t.T.contiguous()), "1 tensors", "has shape [96, 160], expected [160, 96]"),
    "flattened blocks": (m.edit_tensor(DOWN + "_blocks", lambda t: t.flatten(2)), "1 tensors", "expected [8, 96, 2, 16]"),
    "one row too few": (m.edit_tensor(DOWN + "_scales", lambda t: t[:, 1:].contiguous()), "1 tensors", "has shape [8, 95, 2], expected [8, 96, 2]"),
    # transformers turns F8_E8M0 scales into integers: wrong in silence; llama.cpp wants uint8; vLLM computes in bfloat16
    "E8M0 scales": (m.edit_tensor(DOWN + "_scales", lambda t: t.view(torch.float8_e8m0fnu)), "2 stored", "has dtype F8_E8M0"),
    "signed scales": (m.edit_tensor(DOWN + "_scales", lambda t: t.view(torch.int8)), "2 stored", "has dtype I8, expected U8"),
    "signed blocks": (m.edit_tensor(DOWN + "_blocks", lambda t: t.view(torch.int8)), "2 stored", "has dtype I8, expected U8"),
    "float32 norm": (m.edit_tensor("model.norm.weight", lambda t: t.float()), "2 stored", "'model.norm.weight' in"),
    "half precision": (m.edit_tensor("model.layers.0.self_attn.sinks", lambda t: t.half()), "2 stored", "has dtype F16, expected BF16"),
    # vLLM and SGLang cut or fail on an expert size that blocks do not divide
    "expert size": (narrow_experts, "3 block", "intermediate_size = 48 is no multiple of 32"),
    # OpenAI's reference and transformers decode byte 255 as 2^128, llama.cpp ignores that it is NaN; 253 and 254 overflow bfloat16
    "scale byte 253": (m.edit_tensor(GATE_UP + "_scales", with_byte(253)), "4 scales", "holds scale byte 253"),
    "scale byte 254": (m.edit_tensor(GATE_UP + "_scales", with_byte(254)), "4 scales", "holds scale byte 254"),
    "scale byte 255": (m.edit_tensor(GATE_UP + "_scales", with_byte(255)), "4 scales", "holds scale byte 255 (the mark of a NaN"),
    "NaN": (m.edit_tensor(HEAD, lambda t: t * float("nan")), "4 scales", "'lm_head.weight' holds a NaN"),
    "infinity": (m.edit_tensor("model.norm.weight", lambda t: t / 0), "4 scales", "'model.norm.weight' holds a NaN or infinite"),
    # llama.cpp pairs scales with the blocks that it saw last: other experts' in silence where hidden and expert size are equal, as in the releases
    "scales in an earlier shard": (m.move(DOWN + "_scales", beside=FIRST), "5 codes", "'model.layers.1.mlp.experts.down_proj' is spread over"),
    "scales in a later shard": (m.move(DOWN + "_scales", beside=HEAD), "5 codes", "'model.layers.1.mlp.experts.down_proj' is spread over"),
    # llama.cpp reads every model*.safetensors and checks the index against them, vLLM reads what the index names, transformers wants an index
    "stale shard": (lambda d: shutil.copy(m.shard_of(d, HEAD), d / "model-00009-of-00009.safetensors"), "6 index", "stale"),
    "shard name": (m.rename_shard(HEAD, "last.safetensors"), "6 index", "last.safetensors is not named"),
    "no total size": (m.edit_index(lambda index: index["metadata"].pop("total_size")), "6 index", "total_size"),
    "wrong total size": (m.edit_index(lambda index: index["metadata"].update(total_size=5)), "0 readable", "metadata.total_size is 5"),
    "missing shard": (lambda d: m.shard_of(d, HEAD).unlink(), "0 readable", "is missing"),
    "no index": (lambda d: (d / m.INDEX).unlink(), "0 readable", "4 safetensors files, but neither model.safetensors nor"),
    "index incomplete": (m.edit_index(lambda index: index["weight_map"].pop(HEAD)), "0 readable", "'lm_head.weight' of"),
    "index names a ghost": (m.edit_index(lambda i: i["weight_map"].update(ghost=i["weight_map"][HEAD])), "0 readable", "'ghost' is in no"),
    "index names another shard": (m.edit_index(wrong_shard), "0 readable", "'lm_head.weight' lies in"),
    "index and single file": (lambda d: shutil.copy(m.shard_of(d, HEAD), d / "model.safetensors"), "0 readable", "both model.safetensors and"),
    "a tensor twice": (m.copy_to_shard_of(HEAD, beside=FIRST), "0 readable", "tensor 'lm_head.weight' is in both"),
    # transformers refuses files without the mark; the library accepts duplicate keys, and every reader believes the offsets
    "no metadata": (m.drop_metadata, "7 file", "lacks the metadata"),
    "metadata of numbers": (m.edit_header(HEAD, m.as_json(lambda h: h.update(__metadata__={"a": 1}))), "0 readable", "must map strings to strings"),
    "name twice in a header": (m.edit_header(HEAD, lambda t: '{"lm_head.weight":{},' + t[1:]), "0 readable", "key 'lm_head.weight' appears twice"),
    "trailing bytes": (m.edit_header(HEAD, str, lambda content: content + b"x"), "0 readable", "1 bytes follow the last tensor"),
    "truncated": (m.edit_header(HEAD, str, lambda content: content[:-1]), "0 readable", "truncated, 1 bytes are missing"),
    "hole": (m.edit_header(HEAD, m.as_json(shift), lambda content: content + bytes(8)), "0 readable", "hole in the payload"),
    "overlap": (m.edit_header(NORM, m.as_json(lambda h: shift(h, NORM, -8))), "0 readable", "overlap in the payload before tensor 'model.norm"),
    "unknown dtype": (m.edit_header(HEAD, m.as_json(lambda h: h[HEAD].update(dtype="F4"))), "0 readable", "unknown dtype 'F4'"),
    "endless header": (lambda d: m.shard_of(d, HEAD).write_bytes(bytes([255] * 4 + [0] * 60)), "0 readable", "the header claims 4294967295"),
    # without quant_method transformers initialises all experts at random; llama.cpp chooses by architecture, the others by model type
    "architecture": (m.edit_config(architectures=["LlamaForCausalLM"]), "8 config", "architectures"),
    "model type": (m.edit_config(model_type="llama"), "0 readable", "model_type = 'llama' is not gpt-oss"),
    "not quantized": (m.edit_config(quantization_config=KeyError), "0 readable", "quant_method None"),
    "foreign method": (m.edit_config(quantization_config={"quant_method": "fp8"}), "0 readable", "quant_method 'fp8' is not supported"),
    "excluded modules": (m.edit_config(quantization_config={"quant_method": "mxfp4"}), "8 config", "modules_to_not_convert"),
    # defaults of their own for what is missing: vLLM and transformers truncate, derived head_dim = hidden / heads, SGLang needs layer_types
    "no truncate": (m.edit_rope(truncate=KeyError), "8 config", "truncate"),
    "no beta_fast": (m.edit_rope(beta_fast=KeyError), "8 config", "'beta_fast'"),
    "no beta_slow": (m.edit_rope(beta_slow=KeyError), "8 config", "'beta_slow'"),
    "no factor": (m.edit_rope(factor=KeyError), "0 readable", "'factor' is missing"),
    "no trained length": (m.edit_rope(original_max_position_embeddings=KeyError), "0 readable", "'original_max_position_embeddings' is missing"),
    "no RoPE settings": (m.edit_config(rope_scaling=KeyError), "0 readable", "gpt-oss needs YaRN settings"),
    "no theta": (m.edit_config(rope_theta=KeyError), "0 readable", "rope_theta is missing"),
    "no head_dim": (m.edit_config(head_dim=KeyError), "0 readable", "missing keys ['head_dim']"),
    "no window": (m.edit_config(sliding_window=KeyError), "0 readable", "missing keys ['sliding_window']"),
    "no layer types": (m.edit_config(layer_types=KeyError), "8 config", "layer_types"),
    "unknown layer type": (m.edit_config(layer_types=["sliding", "full", "sliding"]), "0 readable", "unknown layer_types ['full', 'sliding']"),
    "no limit": (m.edit_config(swiglu_limit=KeyError), "8 config", "swiglu_limit"),
    "no pad id": (m.edit_config(pad_token_id=KeyError), "8 config", "pad_token_id"),
    "tied embeddings": (m.edit_config(tie_word_embeddings=True), "0 readable", "tie_word_embeddings = True is not gpt-oss"),
    "unknown key": (m.edit_config(parallel_residual=True), "0 readable", "unknown keys ['parallel_residual']"),
    "float32 said": (m.edit_config(dtype="float32"), "8 config", "dtype is 'float32'"),
    # TensorRT-LLM lets this file win over config.json
    "ModelOpt's config": (lambda d: (d / "hf_quant_config.json").write_text("{}"), "8 config", "hf_quant_config.json is present"),
    # what no demand can see: hashes do
    "flipped bit": (m.flip_bit, "11 hashes", "bytes of 'model.layers."),
    "changed template": (lambda d: (d / "chat_template.jinja").write_text("x"), "11 hashes", "bytes of 'chat_template.jinja' differ"),
    "lost tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "11 hashes", "'tokenizer.json': expected, but not in the files"),
    "truncate turned on": (m.edit_rope(truncate=True), "11 hashes", "'config.json' differ"),
    "manifest damaged": (lambda d: (d / m.MANIFEST).write_text("{"), "11 hashes", "not valid JSON"),
    "manifest emptied": (lambda d: (d / m.MANIFEST).write_text("{}"), "11 hashes", "xxh3_128"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported_under_its_title(fault, directory):
    break_it, title, words = FAULTS[fault]
    if not title.startswith("11"):
        (directory / m.MANIFEST).unlink()  # its hashes would report every fault once more
    break_it(directory)
    report = verify_dir(directory)
    failed = [check.title for check in report.checks if check.problems]
    assert not report.ok and len(failed) == 1 and failed[0].startswith(title), str(report)
    assert any(words in failure for failure in report.failures), report.failures
    assert words in str(report) and "FAIL" in str(report)


# ---- well-formed directories that hold other weights ------------------------------------------------------------------------


def swap_nibbles(blocks):
    return (blocks << 4) | (blocks >> 4)


def halves(blocks):
    """The order of llama.cpp's blocks: elements 0-15 in the low nibbles, 16-31 in the high ones."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    return codes[..., :16] | (codes[..., 16:] << 4)


def one_more_at_77(scales):
    return scales + (torch.arange(scales.numel()).reshape(scales.shape) == 77).to(torch.uint8)


def gate_rows_first(tensor):
    return torch.cat([tensor[:, 0::2], tensor[:, 1::2]], 1)


def quantized_along_rows(directory):
    """Blocks along the output dim: the fault of quantizing transformers' transposed [E, in, out] matrices along their last dim."""
    path = m.shard_of(directory, DOWN + "_blocks")
    tensors, fmt = load_file(path), Mxfp4()
    packed, scales = (tensors[f"{DOWN}_{part}"].numpy() for part in ("blocks", "scales"))
    values = fmt.decode(mxfp4.Codes(packed.reshape(*packed.shape[:2], -1), scales), "float32")
    codes = fmt.encode(fmt.decode(fmt.encode(values.swapaxes(1, 2)), "float32").swapaxes(1, 2))
    m.edit_tensor(DOWN + "_blocks", lambda t: torch.tensor(np.asarray(codes.packed)).reshape(t.shape))(directory)
    m.edit_tensor(DOWN + "_scales", lambda t: torch.tensor(np.asarray(codes.scales)))(directory)


BOTH = ("_blocks", "_scales")
OTHER_WEIGHTS = {
    "nibbles swapped": (m.edit_tensor(DOWN + "_blocks", swap_nibbles), "down_proj"),
    "llama.cpp's order in a block": (m.edit_tensor(DOWN + "_blocks", halves), "down_proj"),
    "gate and up not interleaved": (m.together(*(m.edit_tensor(GATE_UP + part, gate_rows_first) for part in BOTH)), "gate_up_proj"),
    "blocks along the wrong dim": (quantized_along_rows, "down_proj"),
    "experts exchanged": (m.together(*(m.edit_tensor(DOWN + part, lambda t: t.flip(0).contiguous()) for part in BOTH)), "down_proj"),
    "one scale off by one": (m.edit_tensor(DOWN + "_scales", one_more_at_77), "down_proj"),
    "scales of the next row": (m.edit_tensor(DOWN + "_scales", lambda t: t.roll(1, 1)), "down_proj"),
    "rows of k reversed": (m.edit_tensor("model.layers.1.self_attn.k_proj.weight", lambda t: t.flip(0).contiguous()), "k_proj.weight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", OTHER_WEIGHTS)
def test_other_weights_in_a_good_directory_are_seen_by_comparison_and_by_hashes(fault, directory, mxfp4_dir):
    """Every conformance check passes, as every client loads these without a word."""
    break_it, name = OTHER_WEIGHTS[fault]
    break_it(directory)
    report = verify_dir(directory, against=mxfp4_dir)
    assert [check.title[:2] for check in report.checks if check.problems] == ["10", "11"], str(report)
    (difference,) = (failure for failure in report.failures if failure.startswith("10"))
    assert f"{name}': " in difference and "values differ" in difference
    hashed = [failure for failure in report.failures if failure.startswith("11")]
    assert all(name in failure for failure in hashed)
