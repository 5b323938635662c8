"""Teacher forcing judges as greedy decoding does: on the shipped model, for passing and failing rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.checkpoint.models import load_model
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data.harmony import load_tokenizer
from gptoss_jax.data.sources import load_rows
from gptoss_jax.evaluation import answer, make_evaluation_set, score
from gptoss_jax.evaluation.predict import make_predict


@pytest.mark.slow
def test_a_row_passes_exactly_when_greedy_decoding_writes_its_answer():
    model = load_model("nano", jnp.float32)
    tokenizer = load_tokenizer(model.directory)
    rows = load_rows(NANO / "tasks" / "dev.jsonl").rows
    chosen = [row for task in ("A", "B", "H", "Eng") for row in [r for r in rows if r["task"] == task][:6]]
    predict = make_predict(model.config, jnp.float32)(model.params)
    passed = score(predict, make_evaluation_set(chosen, tokenizer, 128, 16)).passed
    assert passed.any() and not passed.all()
    written = answer(predict, [row["messages"][:-1] for row in chosen], tokenizer, 64)
    right = [text == f"<|channel|>final<|message|>{row['messages'][-1]['content']}<|return|>" for text, row in zip(written, chosen)]
    np.testing.assert_array_equal(passed, right)
