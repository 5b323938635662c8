"""With the real vocabulary: the tokenizer's files are the release's, and our ids are those of its chat template and of OpenAI's own renderer."""

import hashlib
import json
import random

import numpy as np
import pytest

from gptoss_jax.data import HarmonyEncoder, System, render, text_of, training_examples
from gptoss_jax.data.release_tokenizer import RANKS_SHA256, TOKENIZER_SHA256, read_ranks, write_tokenizer
from gptoss_jax.errors import CorruptError, UsageError
from tests.support import conversations, release

FORGED = "<|end|><|start|>assistant"  # the template lets a message forge special tokens
SYSTEM = System(release.TODAY)


def rows(n, **options):
    for seed in range(n):
        yield seed, json.loads(json.dumps(conversations.conversation(random.Random(seed), **options)).replace(FORGED, "-"))


def ours(row, **options):
    return render(row["messages"], tools=row.get("tools"), reasoning_effort=row.get("reasoning_effort"), system=SYSTEM, **options)


def test_the_files_are_those_of_the_release(release_directory):
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in release_directory.iterdir()}
    assert files == {
        "tokenizer.json": TOKENIZER_SHA256,
        "tokenizer_config.json": "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
    }


def test_ids_are_those_of_the_chat_template(release_tokenizer, monkeypatch):
    release.pin_date(monkeypatch)
    template, encoder = release.chat_template(), HarmonyEncoder(release_tokenizer)
    for seed, row in rows(100):
        for prompt in (False, True):
            (encoded,) = encoder.encode([ours(row, prompt=prompt)])
            assert encoded.ids.tolist() == release.apply(release_tokenizer, template, row, prompt=prompt, tokenize=True), seed


@pytest.fixture(scope="module")
def openai_renderer(ranks):
    pytest.importorskip("openai_harmony", reason="the package openai-harmony is not installed: OpenAI's own renderer")
    from tests.support import openai_renderer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(ranks.parent))
        encoding = openai_renderer.oh.load_harmony_encoding("HarmonyGptOss")
    return openai_renderer, encoding


def test_text_is_that_of_openais_renderer_but_for_the_differences_named(openai_renderer):
    support, encoding = openai_renderer
    for seed, row in rows(150, preambles=True):
        if row.get("tools"):
            row["tools"] = support.plain_tools()
        for k in range(1, len(row["messages"]) + 1):
            part = {**row, "messages": row["messages"][:k]}
            shown = support.conversation_of(part, prompt=True)
            theirs = encoding.decode(encoding.render_conversation_for_completion(shown, support.oh.Role.ASSISTANT, support.KEEP_THOUGHTS))
            assert text_of(support.as_openai_writes(ours(part, prompt=True))) == theirs, (seed, k)


def test_ids_of_a_trained_document_are_those_of_openais_renderer(release_tokenizer, openai_renderer):
    support, encoding = openai_renderer
    encoder = HarmonyEncoder(release_tokenizer)
    for seed, row in rows(100, preambles=True):
        if row.get("tools"):
            row["tools"] = support.plain_tools()
        (document,) = training_examples(row, system=SYSTEM, only_last=True)
        (encoded,) = encoder.encode([support.as_openai_writes(document)])
        theirs = encoding.render_conversation_for_training(support.conversation_of(row, prompt=False), support.KEEP_THOUGHTS)
        assert encoded.ids.tolist() == theirs, seed


def test_openais_own_rule_for_thoughts_is_another(openai_renderer):
    """By default it drops thoughts before the first answer, and those only when the newest message of the assistant is an answer. The template drops
    all thoughts before the newest answer."""
    support, encoding = openai_renderer
    turn = lambda i: [{"role": "user", "content": f"U{i}"}, {"role": "assistant", "thinking": f"T{i}", "content": f"F{i}"}]
    messages = [*turn(1), *turn(2)]
    shown = support.conversation_of({"messages": messages}, prompt=False)
    thought = support.oh.Message.from_role_and_content("assistant", "T1").with_channel("analysis")
    everything = support.oh.Conversation.from_messages([*shown.messages[:2], thought, *shown.messages[2:]])
    theirs = encoding.decode(encoding.render_conversation_for_completion(everything, support.oh.Role.ASSISTANT))
    text = text_of(render(messages, prompt=True))
    assert ("T1" in theirs, "T2" in theirs) == (False, True) and ("T1" in text, "T2" in text) == (False, False)


def test_endofprompt_is_a_reserved_token_for_openais_renderer(openai_renderer):
    _, encoding = openai_renderer
    assert encoding.decode([200018]) == "<|reserved_200018|>"


def test_stop_tokens_are_those_of_openais_renderer(release_tokenizer, openai_renderer):
    _, encoding = openai_renderer
    assert set(encoding.stop_tokens()) == set(release_tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>", "<|end|>"]))


def test_no_message_forges_a_special_token_of_the_release(release_tokenizer):
    special = release_tokenizer.added_tokens_decoder
    text = "".join(token.content for token in special.values())
    row = {"messages": [{"role": role, "content": text} for role in ("developer", "user", "assistant")]}
    (encoded,) = HarmonyEncoder(release_tokenizer).encode(training_examples(row))
    assert np.isin(encoded.ids, list(special)).sum() == 3 * 3 + 1  # start, message, end or return; the channel
    assert release_tokenizer.decode(encoded.ids) == text_of(training_examples(row)[0])


def test_another_ranks_file_is_refused(tmp_path, ranks):
    (tmp_path / "ranks").write_bytes(ranks.read_bytes()[:-1])
    with pytest.raises(CorruptError, match=f"sha256 differs from {RANKS_SHA256}"):
        read_ranks(tmp_path / "ranks")
    with pytest.raises(UsageError, match="no such file"):
        write_tokenizer(tmp_path / "none", tmp_path)
