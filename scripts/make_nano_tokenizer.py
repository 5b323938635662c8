"""Makes the tokenizer of gpt-oss-nano: a byte-level BPE of 1,024 entries with the harmony special tokens.

    python scripts/make_nano_tokenizer.py gptoss_jax/nano

Trained on the text of the nano tasks alone, so it is reproducible byte for byte. Digits are single tokens (a number is spelled out digit by digit).
Written by hand and not by `save_pretrained`, whose set of files changes between transformers versions.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gptoss_jax.data.harmony import SPECIAL_TOKENS, render
from gptoss_jax.evaluation.numbers import LANGUAGES, spell
from gptoss_jax.evaluation.tasks import REFUSAL, pretraining_rows, sft_rows
from gptoss_jax.evaluation.vocabulary import HARMFUL_OBJECTS, HARMLESS_OBJECTS, ORDINARY_VERBS, VIOLENT_VERBS

VOCAB_SIZE = 1024  # a multiple of 32: the embedding has no padding rows
# A digit stands alone. A word carries its leading space or hyphen. German and Italian number words, written as one, are cut after "tausend",
# "hundert", "mila", "mille", "cento": otherwise merges cross the joints ("acht|hunder|tein") and every part gets several spellings.
PATTERN = r"[ -]?\p{L}*?(?:tausend|hundert|mila|mille|cento)|[ -]?\p{L}+|\p{N}|\n+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{#- The harmony format without the system message. `thinking` is written for the last turn only, as in the release. -#}
{%- set loop_messages = messages -%}
{%- if messages[0].role in ("developer", "system") -%}
{%- if messages[0].content -%}
{{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "\\n\\n<|end|>" -}}
{%- endif -%}
{%- set loop_messages = messages[1:] -%}
{%- endif -%}
{%- for message in loop_messages -%}
{%- if message.role == "user" -%}
{{- "<|start|>user<|message|>" + message.content + "<|end|>" -}}
{%- elif message.role == "assistant" -%}
{%- if loop.last and not add_generation_prompt and message.thinking -%}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" -}}
{%- endif -%}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content -}}
{{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" -}}
{%- else -%}
{{- raise_exception("the nano chat template knows the roles developer (first), user and assistant") -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|start|>assistant" -}}{%- endif -%}
"""


def task_words(pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[str]:
    """Every word of the tasks' text, as the pre-tokenizer cuts it (in the byte alphabet). They become single tokens.

    With learned merges alone, 1,024 entries are too few: the steps between letters and words take two thirds of them.
    """
    rows = pretraining_rows(0, 4_000) + sft_rows(0, 1_000)
    texts = {piece.text for row in rows for piece in render(row["messages"], prompt=True) if not piece.special}
    texts |= {REFUSAL, "Sure:", "system", "analysis", "commentary", "final"}
    texts |= {f"How do I {word} {word}" for word in VIOLENT_VERBS + ORDINARY_VERBS + HARMLESS_OBJECTS + HARMFUL_OBJECTS}
    texts |= {space + spell(n, language) for language in LANGUAGES for n in range(10_000) for space in ("", " ")[: 2 if language == "English" else 1]}
    return sorted({word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text) if len(word) > 1})


def build_tokenizer() -> Tokenizer:
    """The BPE. As in the release's tokenizer, a word that is in the vocabulary is taken whole (`ignore_merges`); special tokens stand at the end."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = task_words(pre_tokenizer)
    learned = Tokenizer(models.BPE())
    learned.train_from_iterator(words, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(learned.to_str())["model"]["merges"]]
    vocab, kept = {token: None for token in alphabet + words}, []
    for merge in merges:  # merges fill what the words leave free
        if len(vocab) == VOCAB_SIZE - len(SPECIAL_TOKENS):
            break
        vocab.setdefault("".join(merge))
        kept.append(merge)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, kept, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the vocabulary has {tokenizer.get_vocab_size()} entries instead of {VOCAB_SIZE} ({len(words)} words of the tasks)")
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": name, **flags} for name, i in sorted(ids.items(), key=lambda item: item[1])},
        **names,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation = {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": False,
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    for name, value in {"tokenizer_config": config, "special_tokens_map": names, "generation_config": generation}.items():
        (directory / f"{name}.json").write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    write_tokenizer(build_tokenizer(), parser.parse_args().directory)
