"""The tokenizer that ships is what its script makes, byte for byte, and it cuts the tasks into words."""

import runpy
from pathlib import Path

import pytest

import gptoss_jax
from gptoss_jax.data import load_tokenizer
from gptoss_jax.data.harmony import SPECIAL_TOKENS
from gptoss_jax.evaluation.numbers import LANGUAGES, spell
from gptoss_jax.evaluation.vocabulary import HARMFUL_OBJECTS, HARMLESS_OBJECTS, ORDINARY_VERBS, VIOLENT_VERBS

NANO = Path(gptoss_jax.__file__).parent / "nano"
SCRIPT = Path(gptoss_jax.__file__).parent.parent / "scripts" / "make_nano_tokenizer.py"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.mark.slow
def test_shipped_files_are_what_the_script_makes(tmp_path):
    script = runpy.run_path(str(SCRIPT))
    script["write_tokenizer"](script["build_tokenizer"](), tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (NANO / path.name).read_bytes(), path.name


def test_vocabulary_is_a_multiple_of_32_with_the_special_tokens_at_its_end(tokenizer):
    assert len(tokenizer) == 1024
    assert [tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS] == list(range(1024 - len(SPECIAL_TOKENS), 1024))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|startoftext|>", "<|return|>", "<|endoftext|>")


def test_any_text_survives(tokenizer):
    for text in ("", " a\n\n b\tc ", "Grüße 猫 🐈 \u202e 1e-5", "".join(map(chr, range(1, 1000)))):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_words_of_the_tasks_are_one_token_and_digits_stand_alone(tokenizer):
    for word in VIOLENT_VERBS + ORDINARY_VERBS + HARMLESS_OBJECTS + HARMFUL_OBJECTS:
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    assert tokenizer.batch_decode([[i] for i in tokenizer("Spell out 4821.")["input_ids"]]) == ["Spell", " out", " ", "4", "8", "2", "1", "."]


def test_number_words_are_cut_at_their_joints(tokenizer):
    def parts(number, language):
        return tokenizer.batch_decode([[i] for i in tokenizer(spell(number, language))["input_ids"]])

    assert parts(4821, "German") == ["viertausend", "achthundert", "einundzwanzig"]
    assert parts(4821, "Italian") == ["quattromila", "ottocento", "ventuno"]
    assert parts(4821, "English") == ["four", " thousand", " eight", " hundred", " twenty", "-one"]
    for language in LANGUAGES:
        assert max(len(parts(number, language)) for number in range(0, 10_000, 7)) <= 8
