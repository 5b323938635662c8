"""Generation token for token: against transformers, against running the whole prefix again, across batches, chunks and stops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data.harmony import load_tokenizer
from gptoss_jax.data.sources import load_rows
from gptoss_jax.errors import UsageError
from gptoss_jax.evaluation import generate as module
from gptoss_jax.evaluation.generate import Generator, bucket
from gptoss_jax.evaluation.greedy import greedy_decode
from gptoss_jax.evaluation.predict import make_predict
from gptoss_jax.evaluation.sampling import Sampling
from gptoss_jax.quant import default_policy, make_expert_quant
from gptoss_jax.sharding import make_mesh, param_shardings
from tests.support.params import lively_params

LENGTHS = (3, 30, 11, 20)  # the window is 7
NEW = 40


@pytest.fixture(scope="module")
def params(tiny_config):
    return lively_params(tiny_config)


@pytest.fixture(scope="module")
def prompts(tiny_config):
    rng = np.random.default_rng(0)
    return [rng.integers(0, tiny_config.vocab_size, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module")
def generator(tiny_config, params):
    return Generator(tiny_config, params, jnp.float32)


@pytest.fixture(scope="module")
def written(generator, prompts):
    return generator.generate(prompts, NEW)


def equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == np.int32
        np.testing.assert_array_equal(a, b)


def test_greedy_tokens_are_those_of_transformers(tiny_config, params, prompts, written):
    import torch

    from tests.support.torch_model import hf_model

    longest = max(LENGTHS)
    padded = np.stack([np.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    mask = np.stack([np.arange(longest) >= longest - len(prompt) for prompt in prompts])
    theirs = hf_model(tiny_config, params).generate(
        torch.tensor(padded).long(), attention_mask=torch.tensor(mask).long(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    equal(written, list(theirs[:, longest:].numpy().astype(np.int32)))
    assert all(len(set(tokens.tolist())) > 20 for tokens in written), "a model that repeats itself shows little"


def test_greedy_tokens_are_those_of_running_the_whole_prefix_again(tiny_config, params, prompts):
    stops = (7, 90)
    predict = make_predict(tiny_config, jnp.float32)(params)
    want = greedy_decode(predict, prompts, max(LENGTHS) + NEW, stops)
    got = Generator(tiny_config, params, jnp.float32).generate(prompts, max(LENGTHS) + NEW, stops)
    for a, b in zip(got, want):  # the oracle ends at its row length
        np.testing.assert_array_equal(a[: len(b)], b)
    assert any(a[-1] in stops for a in got) and all(token not in stops for a in got for token in a[:-1])


def test_a_model_trained_under_quantization_generates_through_it(tiny_config, params, prompts, written):
    quant = make_expert_quant(default_policy("mxfp4"), jnp.float32)
    want = greedy_decode(make_predict(tiny_config, jnp.float32, quant)(params), prompts[:2], max(LENGTHS) + 10, ())
    got = Generator(tiny_config, params, jnp.float32, expert_quant=quant).generate(prompts[:2], 10)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_array_equal(got[0], want[0][:10])
    assert any((a != b[:10]).any() for a, b in zip(got, written)), "quantization changes nothing here: the test would not see it missing"


def test_answers_do_not_depend_on_batches_or_streaming(tiny_config, params, prompts, written):
    seen = []
    alone = Generator(tiny_config, params, jnp.float32, batch_size=3)
    equal(alone.generate(prompts, NEW, on_token=lambda i, token: seen.append((i, token))), written)
    for i, tokens in enumerate(written):
        assert [token for j, token in seen if j == i] == tokens.tolist()


@pytest.mark.slow
def test_samples_of_a_row_do_not_depend_on_the_others(tiny_config, params, prompts, generator):
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=11)
    together = generator.generate(prompts, NEW, sampling=sampling)
    equal(Generator(tiny_config, params, jnp.float32, batch_size=2).generate(prompts, NEW, sampling=sampling), together)
    other = generator.generate(prompts, NEW, sampling=Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=12))
    assert all((a != b).any() for a, b in zip(together, other))
    twice = generator.generate([prompts[0]] * 4, NEW, sampling=sampling)
    assert len({tuple(tokens.tolist()) for tokens in twice}) == 4, "equal prompts in different rows draw differently"


@pytest.mark.parametrize("new", [1, 2, 17, 33])
def test_lengths_around_the_chunks_of_the_device(new, generator, prompts, written):
    equal(generator.generate(prompts, new), [tokens[:new] for tokens in written])


def test_a_row_ends_with_its_first_stop_token_and_at_the_end_of_the_context(tiny_config, params, generator, prompts, written):
    stops = [int(written[0][0]), int(written[1][5])]
    got = generator.generate(prompts, NEW, stops)
    for tokens, free in zip(got, written):
        end = next((i for i, token in enumerate(free.tolist()) if token in stops), NEW - 1)
        np.testing.assert_array_equal(tokens, free[: end + 1])
    assert len(got[0]) == 1
    long = np.arange(tiny_config.max_position_embeddings - 5, dtype=np.int32) % tiny_config.vocab_size
    assert [len(tokens) for tokens in generator.generate([long, prompts[0]], 8)] == [5, 8]


def test_new_weights_and_new_lengths_of_a_size_compile_nothing(tiny_config, params, prompts, written):
    before = module._start._cache_size(), module._go_on._cache_size()
    Generator(tiny_config, {name: value * 0.9 for name, value in params.items()}, jnp.float32).generate(prompts, NEW - 3)
    assert (module._start._cache_size(), module._go_on._cache_size()) == before
    sizes = {bucket(n) for n in range(1, 131073)}
    assert len(sizes) == 27 and all(n <= bucket(n) <= max(16, 1.5 * n) for n in range(1, 5000))


@pytest.mark.slow
def test_sharded_parameters_write_the_same_tokens(tiny_config, params, prompts, written):
    shardings = param_shardings(tiny_config, make_mesh(fsdp=2, expert=2, tensor=2))
    sharded = {name: jax.device_put(value, shardings[name]) for name, value in params.items()}
    generator = Generator(tiny_config, sharded, jnp.float32)
    assert generator.stacked is not None and Generator(tiny_config, params, jnp.float32).stacked is None
    equal(generator.generate(prompts, NEW), written)


def test_no_prompts_give_no_answers(generator):
    assert generator.generate([], 5) == []


@pytest.mark.parametrize(
    "prompt, new, message",
    [([], 5, "prompt 0 has 0 tokens"), ([1] * 512, 5, "prompt 0 has 512 tokens"), ([1, 160], 5, "ids from 1 to 160"), ([1], 0, "max_new_tokens = 0")],
)
def test_what_cannot_be_generated_is_refused(prompt, new, message, generator):
    with pytest.raises(UsageError, match=message):
        generator.generate([np.array(prompt, np.int32)], new)


def test_the_shipped_model_answers_conversations():
    """Refusals and English numbers, which the base model knows by heart; with the answer apart from its tags."""
    model = load_model("nano", jnp.float32)
    rows = [row for row in load_rows(NANO / "tasks" / "dev.jsonl").rows if row["task"] in ("H", "Eng")][::40]
    answers = Generator(model.config, model.params, jnp.float32).answer(
        [row["messages"][:-1] for row in rows], load_tokenizer(model.directory), max_new_tokens=64
    )
    right = [answer.final == row["messages"][-1]["content"] and answer.stopped for row, answer in zip(rows, answers)]
    assert len(rows) >= 5 and np.mean(right) > 0.7
    assert all(answer.raw.startswith("<|channel|>final<|message|>") and not answer.analysis for answer in answers)
