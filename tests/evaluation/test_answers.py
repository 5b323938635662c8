"""Answers of a model, orderly and not, taken apart into channels; streaming says the same as parsing the whole."""

import random
import re

import numpy as np
import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data.harmony import SPECIAL_TOKENS, load_tokenizer
from gptoss_jax.evaluation.answers import Answer, AnswerParser, Call, TokenStream, parse_answer

THOUGHT = "<|channel|>analysis<|message|>Think.<|end|>"
CASES = {
    "orderly": (THOUGHT + "<|start|>assistant<|channel|>final<|message|>Yes.<|return|>", Answer("Think.", "", "Yes.", True)),
    "final_only": ("<|channel|>final<|message|>Yes.<|return|>", Answer("", "", "Yes.", True)),
    "cut_in_text": (THOUGHT + "<|start|>assistant<|channel|>final<|message|>Ye", Answer("Think.", "", "Ye", False)),
    "cut_in_thoughts": ("<|channel|>analysis<|message|>Thi", Answer("Thi", "", "", False)),
    "cut_in_header": (THOUGHT + "<|start|>assistant<|channel|>fin", Answer("Think.", "", "", False)),
    "cut_in_first_header": ("<|channel|>anal", Answer("", "", "", False)),
    "no_header": ("Yes, of course.<|return|>", Answer("", "", "Yes, of course.", True)),
    "no_header_cut": ("Yes, of", Answer("", "", "Yes, of", False)),
    "no_channel": ("<|message|>Yes.<|return|>", Answer("", "", "Yes.", True)),
    "empty": ("", Answer("", "", "", False)),
    "only_stop": ("<|return|>", Answer("", "", "", True)),
    "unknown_channel": ("<|channel|>notes<|message|>Hm.<|end|>", Answer("", "Hm.", "", False)),
    "no_end": ("<|channel|>analysis<|message|>Think.<|start|>assistant<|channel|>final<|message|>Yes.<|return|>", Answer("Think.", "", "Yes.", True)),
    "channel_in_text": ("<|channel|>analysis<|message|>Think.<|channel|>final<|message|>Yes.<|return|>", Answer("Think.", "", "Yes.", True)),
    "plays_the_user": ("<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>And?<|end|>", Answer("", "", "Yes.", False)),
    "text_after_end": (THOUGHT + "Yes.<|return|>", Answer("Think.", "", "Yes.", True)),
    "after_stop": ("<|channel|>final<|message|>Yes.<|return|><|channel|>final<|message|>No.", Answer("", "", "Yes.", True)),
    "two_finals": ("<|channel|>final<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>", Answer("", "", "A\nB", True)),
    "preamble_and_call": (
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
        Answer("", "I look.", "", True, (Call("functions.f", "{}"),)),
    ),
    "recipient_in_role": (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|>[1]<|call|>",
        Answer("Hm.", "", "", True, (Call("functions.f", "[1]"),)),
    ),
    "call_without_text": (" to=functions.f<|channel|>comm", Answer("", "", "", False)),
    "angle_brackets": ("<|channel|>final<|message|>if a <| b |> c<|return|>", Answer("", "", "if a <| b |> c", True)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


def same(got: Answer, want: Answer, text: str):
    assert (got.analysis, got.commentary, got.final, got.stopped, got.calls) == (want.analysis, want.commentary, want.final, want.stopped, want.calls)
    assert text.startswith(got.raw)


@pytest.mark.parametrize("name", CASES)
def test_text_is_taken_apart(name):
    text, want = CASES[name]
    same(parse_answer(text), want, text)


@pytest.mark.parametrize("name", CASES)
def test_tokens_give_the_same_as_text(name, tokenizer):
    text, want = CASES[name]
    same(parse_answer(np.array(tokenizer.encode(text, add_special_tokens=False), np.int32), tokenizer), want, text)


def test_a_tag_spelled_in_letters_is_text(tokenizer):
    header = tokenizer.encode("<|channel|>final<|message|>", add_special_tokens=False)
    letters = tokenizer("no <|end|> here", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert parse_answer([*header, *letters], tokenizer).final == "no <|end|> here"


@pytest.mark.parametrize("name", CASES)
def test_what_is_streamed_adds_up_to_the_answer(name):
    """Any cut of the text between tags; every message opens once. Text without a header can be shown at its end only."""
    text, _ = CASES[name]
    rng = random.Random(0)
    parser, shown = AnswerParser(), {}
    for piece in re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text):
        special = piece in SPECIAL_TOKENS
        while piece:
            cut = len(piece) if special else rng.randint(1, len(piece))
            for delta in parser.feed(piece[:cut], special):
                if delta.opens:
                    shown.setdefault(delta.channel, []).append("")
                shown[delta.channel][-1] += delta.text
            piece = piece[cut:]
    answer = parser.finish()
    if name != "no_header_cut":
        assert {channel: "\n".join(texts) for channel, texts in shown.items()} == {
            channel: getattr(answer, channel) for channel in ("analysis", "commentary", "final") if getattr(answer, channel)
        }


def test_no_part_of_a_character_is_ever_shown(tokenizer):
    text = "añ€漢字😀é\ufffd end 漢"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert len(tokens) > len(text), "characters must be spread over tokens for this to mean something"
    stream, shown = TokenStream(tokenizer), ""
    for token in tokens:
        for piece, special in stream.feed(token):
            shown += piece
            assert text.startswith(shown) and not special
    assert shown == text and not stream.flush()


def test_bytes_that_never_become_a_character_come_out_as_in_decoding_the_whole(tokenizer):
    tokens = tokenizer.encode("漢x", add_special_tokens=False)
    broken = [*tokens[:2], *tokens[3:], tokens[0]]
    stream = TokenStream(tokenizer)
    shown = "".join(piece for token in broken for piece, _ in stream.feed(token)) + "".join(piece for piece, _ in stream.flush())
    assert shown == tokenizer.decode(broken) and "\ufffd" in shown
