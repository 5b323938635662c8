"""What the compiled step does per token stays with the tokens: no device sees the router logits, logits or, over context, activations of others."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.data import Batch
from gptoss_jax.sharding import make_mesh
from gptoss_jax.training.config import parse
from gptoss_jax.training.step import Shardings, abstract_state, make_train_step


@pytest.mark.parametrize("sizes", [dict(fsdp=4, expert=2), dict(fsdp=2, context=2, tensor=2)], ids=["fsdp4-expert2", "fsdp2-context2-tensor2"])
def test_neither_logits_nor_router_logits_nor_the_table_of_the_embedding_travel(tiny_config, sizes):
    config = dataclasses.replace(tiny_config, vocab_size=1600, num_hidden_layers=2, layer_types=())
    shardings = Shardings.on(config, make_mesh(**sizes))
    train = parse({"steps": 3, "batch": {"rows": 8}})
    batch = Batch(*(jax.ShapeDtypeStruct((8, 48), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))
    text = make_train_step(config, train, None, shardings).lower(abstract_state(config, train, shardings), batch).compile().as_text()
    moved = re.findall(r"= \(?(\w+\[[\d,]*\])\S*[^=]*? (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text)
    assert len(moved) > 10
    tokens = 8 * 48
    dims = [(kind, [int(n) for n in re.search(r"\[([\d,]*)\]", shape).group(1).split(",") if n]) for shape, kind in moved]
    # [tokens, vocab] of logits, [tokens, experts] of routing; the unembedding [vocab, hidden] does travel
    wide = [(kind, d) for kind, d in dims if d and d[-1] == config.vocab_size]
    routing = [(kind, d) for kind, d in dims if len(d) > 1 and d[-1] == config.num_local_experts and d[-2] >= tokens]
    assert not wide and not routing, (wide, routing)
    # one dim of all tokens, as the router once had, has no layout where both rows and length are cut: the activations of every layer were gathered
    activations = [(kind, d) for kind, d in dims if d and d[-1] == config.hidden_size and 48 in d[:-1] and "context" in sizes]
    # the unembedding is gathered once, in the part of its tensor device, and nothing else has the size of a table: gradients are of a device's shard
    shards = sizes.get("tensor", 1)
    tables = [d for kind, d in dims if len(d) == 2 and config.vocab_size // shards in d and kind == "all-gather"]
    assert not activations and tables == [[config.vocab_size // shards, config.hidden_size]], (activations, tables)
