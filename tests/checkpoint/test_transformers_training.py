"""Our exports in other people's training: transformers and TRL load them, take a step, save; what they saved loads here. Judged on logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gptoss_jax.checkpoint import export_hf, load_params, open_checkpoint, verify_dir
from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.formats import Mxfp4
from gptoss_jax.model import compute_logits, forward
from tests.support.params import lively_params

ATOL = 1e-4  # float32, as in tests/model/test_transformers_parity.py
OPTIONS = dict(output_loading_info=True, attn_implementation="eager", dtype=torch.float32)


def tokens_of(config, length=23):
    return np.random.default_rng(3).integers(0, config.vocab_size, (2, length)).astype(np.int32)


def our_logits(directory, tokens):
    config, params = load_params(directory, jnp.float32)
    run = jax.jit(lambda params, tokens: compute_logits(params, forward(config, params, tokens, dtype=jnp.float32).hidden_BTD))
    return np.asarray(run(params, tokens))


def their_logits(model, tokens):
    with torch.no_grad():
        return model.float().eval()(torch.tensor(tokens).long()).logits.numpy()


def take_step(model, tokens):
    """One step of SGD on predicting the next token: (loss before, loss after)."""
    ids, optimizer = torch.tensor(tokens).long(), torch.optim.SGD(model.parameters(), lr=0.05)
    before = model.train()(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    model.zero_grad()
    with torch.no_grad():
        return before.item(), model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("stored", ["bf16", "mxfp4"])
def test_an_export_trains_in_transformers_and_comes_back(stored, tiny_config, tmp_path):
    """Of a dequantized MXFP4 model transformers saves BF16 or float32 experts; the config must not say MXFP4 any more, and does not."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    export_hf(tmp_path / "export", tiny_config, lively_params(tiny_config), format=stored)
    more = {"quantization_config": Mxfp4Config(dequantize=True)} if stored == "mxfp4" else {}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "export", **OPTIONS, **more)
    assert not any(info.values()), info
    tokens = tokens_of(tiny_config)
    start = our_logits(tmp_path / "export", tokens)
    np.testing.assert_allclose(their_logits(model, tokens), start, atol=ATOL, rtol=0)

    before, after = take_step(model, tokens)
    assert after < before - 0.05
    trained = their_logits(model, tokens)
    assert np.abs(trained - start).max() > 0.1

    model.save_pretrained(tmp_path / "float32")
    assert open_checkpoint(tmp_path / "float32").config == tiny_config
    np.testing.assert_allclose(our_logits(tmp_path / "float32", tokens), trained, atol=ATOL, rtol=0)

    model.to(torch.bfloat16).save_pretrained(tmp_path / "bf16", max_shard_size="200KB")
    assert len(list((tmp_path / "bf16").glob("model-*-of-*.safetensors"))) > 1
    rounded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", **OPTIONS)  # `to` rounded RoPE's frequencies as well
    assert not any(info.values()), info
    np.testing.assert_allclose(our_logits(tmp_path / "bf16", tokens), their_logits(rounded, tokens), atol=ATOL, rtol=0)

    config, params = load_params(tmp_path / "float32", jnp.float32)
    again = export_hf(tmp_path / "again", config, params, format=Mxfp4(), source_dir=tmp_path / "float32")
    assert verify_dir(again, against=params).ok


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of TRL and accelerate
def test_an_export_trains_in_trl_and_comes_back(tmp_path):
    """The model that comes with the package, with its tokenizer and chat template, in TRL's SFTTrainer."""
    pytest.importorskip("trl", reason="training there needs the package trl")
    pytest.importorskip("accelerate", reason="TRL trains with the package accelerate")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    nano = load_model("nano", jnp.bfloat16)
    config, export = nano.config, export_hf(tmp_path / "export", nano.config, nano.params, format="bf16", source_dir=nano.directory)
    model, info = AutoModelForCausalLM.from_pretrained(export, **OPTIONS)
    assert not any(info.values()), info
    tokens = tokens_of(config, 17)
    start = our_logits(export, tokens)
    np.testing.assert_allclose(their_logits(model, tokens), start, atol=ATOL, rtol=0)

    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]} for n in ("one", "two")]
    settings = SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, max_length=128,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(export)
    trainer = SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    trained = their_logits(trainer.model, tokens)
    assert np.abs(trained - start).max() > 0.01
    trainer.save_model(str(tmp_path / "saved"))
    assert open_checkpoint(tmp_path / "saved").config == config
    np.testing.assert_allclose(our_logits(tmp_path / "saved", tokens), trained, atol=ATOL, rtol=0)
