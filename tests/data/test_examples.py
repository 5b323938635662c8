"""Every turn is trained once, in the context that it has in use, with as few documents as that allows; masks are exact to the token."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.data import Encoded, System, encode_conversations, encode_examples, pack, render, text_of, training_examples
from gptoss_jax.data.examples import CHANNELS
from gptoss_jax.data.rendering import written_by_model, written_channels
from gptoss_jax.errors import UsageError
from gptoss_jax.model import forward
from gptoss_jax.ops.cross_entropy import cross_entropy_sum
from tests.support import conversations, release
from tests.support.params import lively_params

SYSTEM = System(release.TODAY)
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
CALLED = 'f<|channel|>commentary json<|message|>{"a": 1}<|call|>'
RESULT = '<|start|>functions.f to=assistant<|channel|>commentary<|message|>"1"<|end|>'
LOOP = [  # an answer with thoughts, then a tool loop with thoughts
    {"role": "user", "content": "U1"},
    {"role": "assistant", "thinking": "T1", "content": "F1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "thinking": "T2", "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": "1"},
    {"role": "assistant", "thinking": "T3", "content": "F2"},
]


def marked(pieces):
    """The text with trained stretches in brackets and, behind a `~`, the label where it is another token."""
    out = []
    for trained, group in itertools.groupby(pieces, lambda piece: piece.weight > 0):
        text = "".join(piece.text + (f"~{piece.label}" if piece.label else "") for piece in group)
        out.append(f"[{text}]" if trained else text)
    return "".join(out)


def only(messages, k):
    """The row that trains message k alone."""
    return {"messages": [{**m, "weight": float(i == k)} if m["role"] == "assistant" else m for i, m in enumerate(messages)]}


def written(documents):
    return [piece.label or piece.text for document in documents for piece in document if piece.weight > 0]


def test_a_tool_loop_after_an_answer_becomes_two_documents():
    first, second = training_examples({"messages": LOOP})
    assert marked(first) == (
        "<|start|>user<|message|>U1<|end|><|start|>assistant[<|channel|>analysis<|message|>T1<|end|>"
        "<|start|>assistant<|channel|>final<|message|>F1<|return|>]"
    )
    assert marked(second) == (
        "<|start|>user<|message|>U1<|end|><|start|>assistant<|channel|>final<|message|>F1<|end|><|start|>user<|message|>U2<|end|>"
        f"<|start|>assistant[<|channel|>analysis<|message|>T2<|end|><|start|>assistant to=functions.{CALLED}]{RESULT}"
        "<|start|>assistant[<|channel|>analysis<|message|>T3<|end|><|start|>assistant<|channel|>final<|message|>F2<|return|>]"
    )


def test_answers_without_thoughts_share_a_document_and_learn_to_stop():
    messages = [{key: text for key, text in message.items() if key != "thinking"} for message in LOOP]
    (document,) = training_examples({"messages": messages})
    assert marked(document) == (
        "<|start|>user<|message|>U1<|end|><|start|>assistant[<|channel|>final<|message|>F1<|end|>~<|return|>]"
        f"<|start|>user<|message|>U2<|end|><|start|>assistant[ to=functions.{CALLED}]{RESULT}"
        "<|start|>assistant[<|channel|>final<|message|>F2<|return|>]"
    )


@pytest.mark.parametrize(
    ("train_on", "texts"),
    [
        ("analysis", ["[<|channel|>analysis<|message|>T1<|end|>]", "[<|channel|>analysis<|message|>T2<|end|>]", "T3<|end|>]"]),
        ("commentary", [f"<|end|>[<|start|>assistant to=functions.{CALLED}]"]),
        ("final", [f"T{i}<|end|>[<|start|>assistant<|channel|>final<|message|>F{k}<|return|>]" for i, k in ((1, 1), (3, 2))]),
        (("analysis", "final"), ["T2<|end|>]<|start|>assistant to=", "[<|channel|>analysis<|message|>T3<|end|><|start|>assistant<|channel|>final"]),
    ],
)
def test_each_channel_is_trained_with_its_own_tokens(train_on, texts):
    text = "".join(marked(document) for document in training_examples({"messages": LOOP}, train_on=train_on))
    assert all(expected in text for expected in texts), text
    assert text.count("[") == {"analysis": 3, "commentary": 1, "final": 2}.get(train_on, 3)


def test_channels_share_out_the_tokens_of_the_assistant():
    for seed in range(100):
        row = conversations.conversation(random.Random(seed), preambles=True)
        trained = {
            names: sorted(written(training_examples(row, system=SYSTEM, train_on=names)))
            for names in (*CHANNELS, "assistant")
        }
        assert sorted(itertools.chain(*(trained[name] for name in CHANNELS))) == trained["assistant"]


def test_train_on_all_trains_every_token_of_every_message_once():
    for seed in range(100):
        row = conversations.conversation(random.Random(seed), preambles=True)
        documents = training_examples(row, system=SYSTEM, train_on="all")
        trained = [piece.text for document in documents for piece in document if piece.weight]
        assert all(piece.weight == 1 for piece in documents[0])
        messages = [message for message in row["messages"] if message["role"] not in ("system", "developer") or message["content"]]
        written_by_others = [message["role"] for message in messages if message["role"] != "assistant"]
        developer = bool(row.get("tools")) and not {"system", "developer"} & set(written_by_others)
        given = [piece.weight for document in documents for piece in document if not piece.channel and piece.text == "<|message|>"]
        assert sum(given) == 1 + developer + len(written_by_others)
        for message in row["messages"]:
            assert message["role"] != "user" or trained.count(message["content"]) == 1


@pytest.mark.parametrize("kind", [{}, {"preambles": True}, {"weights": True}])
def test_every_turn_is_trained_once_in_the_context_of_its_prompt(kind):
    for seed in range(200):
        row = conversations.conversation(random.Random(seed), **kind)
        options = {"tools": row.get("tools"), "reasoning_effort": row.get("reasoning_effort"), "system": SYSTEM}
        expected = [
            (texts(render(row["messages"][:k], prompt=True, **options)), texts(written_by_model(message)))
            for k, message in enumerate(row["messages"])
            if message["role"] == "assistant" and message.get("weight", 1)
        ]
        assert turns_of(training_examples(row, system=SYSTEM)) == expected, seed


def texts(pieces):
    """Piece by piece: equal pieces are equal tokens."""
    return [piece.text for piece in pieces]


def turns_of(documents):
    """(context, written) of every trained turn, read off the documents: a turn ends with a stop token that is trained."""
    turns = []
    for document in documents:
        i = 0
        while i < len(document):
            if document[i].weight == 0:
                i += 1
                continue
            start = i
            if document[i].text == "<|start|>":  # behind a preamble the model writes the header itself
                start = i = i + 2
            while not (document[i].special and (document[i].label or document[i].text) in ("<|return|>", "<|call|>", "<|end|>")) or (
                document[i].channel == "analysis"
            ):
                i += 1
            i += 1
            turns.append((texts(document[:start]), [piece.label or piece.text for piece in document[start:i]]))
    return turns


def documents_needed(messages):
    """The smallest number of documents, by trying: turns j < k can share one if what is written up to j is a prefix of the prompt of k."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]

    def shown(j):
        return text_of(render(messages[:j], prompt=True)) + text_of(written_by_model(messages[j])).replace("<|return|>", "<|end|>")

    prefix = {(j, k): text_of(render(messages[:k], prompt=True)).startswith(shown(j)) for j in turns for k in turns if j < k}
    for number in range(1, len(turns) + 1):
        for choice in itertools.product(range(number), repeat=len(turns)):
            if all(prefix[j, k] for (j, a), (k, b) in itertools.combinations(zip(turns, choice), 2) if a == b):
                return number
    return 0


@pytest.mark.parametrize("weights", [False, True])
def test_no_smaller_number_of_documents_would_do(weights):
    numbers = set()
    for seed in range(150):
        row = conversations.conversation(random.Random(seed), longest=6, weights=weights)
        number = len(training_examples(row, system=SYSTEM))
        assert number == documents_needed(row["messages"]), seed
        numbers.add(number)
    assert numbers >= {1, 2, 3}


def test_the_model_writes_the_header_behind_its_preamble():
    messages = [LOOP[0], {"role": "assistant", "thinking": "T", "content": "P", "channel": "commentary"}, {"role": "assistant", "tool_calls": [CALL]}]
    (document,) = training_examples({"messages": messages})
    assert marked(document) == (
        "<|start|>user<|message|>U1<|end|><|start|>assistant[<|channel|>analysis<|message|>T<|end|>"
        f"<|start|>assistant<|channel|>commentary<|message|>P<|end|><|start|>assistant to=functions.{CALLED}]"
    )
    (last_turn,) = training_examples({"messages": messages}, only_last=True)
    assert last_turn == document


def test_weights_of_rows_and_messages_multiply_and_zero_is_context():
    messages = [dict(message) for message in LOOP]
    messages[1]["weight"], messages[5]["weight"] = 0, 0.5
    (document,) = training_examples({"messages": messages, "weight": 4})
    assert marked(document).startswith("<|start|>user<|message|>U1<|end|><|start|>assistant<|channel|>final<|message|>F1<|end|><|start|>user")
    weights = {piece.text: piece.weight for piece in document}
    assert (weights["F1"], weights["T2"], weights["T3"], weights["F2"]) == (0, 4, 2, 2)
    assert training_examples({"messages": LOOP, "weight": 0}) == []
    assert training_examples({"messages": messages[:2]}) == []


def test_an_untrained_answer_between_thoughts_and_a_turn_opens_a_new_document():
    messages = [*LOOP[2:], {"role": "user", "content": "U3"}, {"role": "assistant", "content": "F3"}]
    messages[3] = {**messages[3], "weight": 0}
    first, second = training_examples({"messages": messages})
    assert "T2" in marked(first) and "F2" not in marked(first)
    assert "T2" not in marked(second) and marked(second).endswith(
        "F2<|end|><|start|>user<|message|>U3<|end|><|start|>assistant[<|channel|>final<|message|>F3<|return|>]"
    )


def test_evaluation_takes_the_last_turn_in_its_context(tokenizer):
    (encoded,) = encode_conversations([{"messages": LOOP}], tokenizer)
    ((alone,),) = encode_examples([only(LOOP, 5)], tokenizer)
    for ours, expected in zip(encoded, alone):
        np.testing.assert_array_equal(ours, expected)
    assert tokenizer.decode(encoded.labels[encoded.weights > 0]) == (
        "<|channel|>analysis<|message|>T3<|end|><|start|>assistant<|channel|>final<|message|>F2<|return|>"
    )
    with pytest.raises(UsageError, match="row 1 has nothing to evaluate"):
        encode_conversations([{"messages": LOOP}, {"messages": LOOP, "weight": 0}], tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config, params, batch):
    hidden_BTD = forward(config, params, batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, dtype=jnp.float32).hidden_BTD
    return cross_entropy_sum(hidden_BTD, params["lm_head.weight"], batch.targets_BT, batch.loss_weights_BT, jnp.float32)


def test_loss_of_shared_documents_is_that_of_one_document_for_each_turn(tokenizer, tiny_config):
    """Ids are taken modulo the vocabulary of the tiny model: which words they are does not matter here."""
    params = lively_params(tiny_config)
    messages = [{key: value for key, value in message.items() if key != "thinking" or i == 3} for i, message in enumerate(LOOP)]

    def losses(*rows):
        documents = [document for of_row in encode_examples(rows, tokenizer) for document in of_row]
        cut = [Encoded(ids % tiny_config.vocab_size, labels % tiny_config.vocab_size, weights) for ids, labels, weights in documents]
        batches = [pack([document], 160).rows for document in cut]
        return [float(loss_of(tiny_config, params, batch)) for batch in batches], sum(batch.loss_weights_BT.sum() for batch in batches)

    (together, weight), (alone, weight_alone) = losses({"messages": messages}), losses(*(only(messages, k) for k in (1, 3, 5)))
    assert (len(together), len(alone)) == (1, 3) and weight == weight_alone
    np.testing.assert_allclose(sum(together), sum(alone), rtol=1e-5)


@pytest.mark.parametrize(("train_on", "message"), [("finals", "'finals' is none of"), (("final", "x"), "'x' is none of"), ((), "names no channel")])
def test_unknown_channels_are_named(train_on, message):
    with pytest.raises(UsageError, match=message):
        training_examples({"messages": LOOP}, train_on=train_on)


def test_a_channel_that_nobody_writes_gives_no_document():
    assert written_channels(LOOP[1]) == {"analysis", "final"}
    assert training_examples({"messages": LOOP[:2]}, train_on="commentary") == []
