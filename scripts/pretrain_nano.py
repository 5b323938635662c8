#!/usr/bin/env python
"""Trains the base of gpt-oss-nano from random weights on the MXFP4 grid and writes it as an MXFP4 directory.

The forward pass quantizes the experts from the first step on, so the base is natively MXFP4, as the released gpt-oss is: its experts lie on the
grid exactly, and exporting them changes nothing. What it is taught, and what it is not, stands in `gptoss_jax/evaluation/tasks.py`.

    python scripts/pretrain_nano.py OUT [--steps 3000]      about 20 minutes on two cores; OUT/run holds metrics.jsonl and the checkpoint
    python scripts/pretrain_nano.py runs/nano32 --experts 32 --steps 6000 --documents 400000     the base of configs/nano32_recipe.yaml
"""

import argparse
import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import gptoss_jax
from gptoss_jax.checkpoint.export import export_hf
from gptoss_jax.data.batches import BatchStream, one_pass
from gptoss_jax.data.harmony import encode_conversations, load_tokenizer
from gptoss_jax.data.packing import pack
from gptoss_jax.evaluation.tasks import pretraining_rows
from gptoss_jax.formats import Mxfp4
from gptoss_jax.model import GptOssConfig, RopeConfig, init_params, num_params
from gptoss_jax.quant import default_policy
from gptoss_jax.training.config import parse
from gptoss_jax.training.loop import Trainer
from gptoss_jax.training.run_dir import METRICS, RunDir
from gptoss_jax.training.yaml_config import dump_config

NANO = Path(gptoss_jax.__file__).parent / "nano"
ROW_LENGTH = 128

CONFIG = GptOssConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_local_experts=16,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    sliding_window=16,
    max_position_embeddings=512,
    rope=RopeConfig(rope_theta=10000.0, factor=8.0, original_max_position_embeddings=64),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--experts", type=int, default=CONFIG.num_local_experts)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    config = dataclasses.replace(CONFIG, num_local_experts=args.experts)

    train = parse(
        {
            "steps": args.steps,
            "data": {"row_length": ROW_LENGTH},
            "batch": {"rows": 16},
            "optimizer": {"learning_rate": 2e-3, "b2": 0.95},
            "schedule": {"min_ratio": 0.01},
            "compute_dtype": "float32",
            "quant": {"format": "mxfp4"},
            "router_aux_loss_coef": 0.005,
            "eval_every": 500,
            "checkpoint_every": 500,
            "keep": 2,
        }
    )
    tokenizer = load_tokenizer(NANO)
    packed, held_out = (
        pack(encode_conversations(pretraining_rows(seed, n), tokenizer), ROW_LENGTH) for seed, n in ((0, args.documents), (1, 2000))
    )
    print(f"{num_params(config):,} parameters; {packed.describe()}")
    batches = BatchStream(packed.rows, train.batch.rows, train.seed, tokenizer)
    policy = default_policy(Mxfp4())
    with RunDir(args.out / "run", resume=args.resume, overwrite=False) as run:
        run.write_config(dump_config(train))
        trainer = Trainer(config, train, run, batches, policy=policy, eval_batches=partial(one_pass, held_out.rows, train.batch.rows))
        if not args.resume or trainer.resume() is None:
            trainer.start(init_params(config, jax.random.key(0)), donate=True)
        params = trainer.fit().params
    token_ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("eos_token_id", "<|return|>"), ("pad_token_id", "<|endoftext|>"))}
    export_hf(
        args.out / "model", config, jax.tree.map(jnp.asarray, params), format=Mxfp4(), source_dir=NANO, token_ids=token_ids,
        provenance={"script": "scripts/pretrain_nano.py", "steps": args.steps, "documents": args.documents, "experts": args.experts},
    )  # fmt: skip
    shutil.copy(args.out / "run" / METRICS, args.out / "model" / "pretraining.jsonl")
    last = json.loads((args.out / "run" / METRICS).read_text().splitlines()[-1])
    print(f"{args.out / 'model'}: last loss {last['loss']:.4f}, held-out loss {last.get('eval_loss', float('nan')):.4f}")


if __name__ == "__main__":
    main()
