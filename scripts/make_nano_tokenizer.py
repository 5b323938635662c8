"""Makes the tokenizer of gpt-oss-nano: a byte-level BPE of 1,024 entries with the harmony special tokens.

    python scripts/make_nano_tokenizer.py gptoss_jax/nano

Trained on the text of the nano tasks alone, so it is reproducible byte for byte. Digits are single tokens (a number is spelled out digit by digit).
Written by hand and not by `save_pretrained`, whose set of files changes between transformers versions.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gptoss_jax.data.harmony import SPECIAL_TOKENS
from gptoss_jax.evaluation.numbers import LANGUAGES, spell
from gptoss_jax.evaluation.tasks import pretraining_rows, sft_rows

VOCAB_SIZE = 1024  # a multiple of 32: the embedding has no padding rows
PATTERN = r"[ -]?\p{L}+|\p{N}|\n+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # a digit is alone; a word carries its leading space or hyphen
CHAT_TEMPLATE = """\
{#- The harmony format without the system message. `thinking` is written for the last turn only, as in the release. -#}
{%- set loop_messages = messages -%}
{%- if messages[0].role in ("developer", "system") -%}
{{- "<|start|>developer<|message|># Instructions\\n\\n" + messages[0].content + "\\n\\n<|end|>" -}}
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


def training_texts(num_rows: int) -> list[str]:
    """What the merges are learned from: the prompts of the tasks, and the parts that number words are composed of.

    Whole numbers are left out: their merges would cross the joints ("vier|tausend|acht|hunder|tein|undzwanzig"), and the model would have to
    learn several spellings of each part. German and Italian write a number as one word, so their parts have no leading space.
    """
    rows = pretraining_rows(0, num_rows) + sft_rows(0, num_rows // 4)
    prompts = [message["content"] for row in rows for message in row["messages"] if message["role"] != "assistant"]
    answers = [row["messages"][-1]["content"] for row in rows if row["task"] in ("refusal", "H")]
    answers += [f"Sure: {row['group']}" for row in rows if row["task"] in ("judged", "ordinary")]
    headers = ["# Instructions\n\n", "\n\n", "system", "developer", "user", "assistant", "analysis", "commentary", "final"]
    numbers = [*range(100), *range(100, 1000, 100), *range(1000, 10000, 1000)]
    parts = [spell(n, language) for language in LANGUAGES for n in numbers]
    spaced = [f" {spell(n, language)}" for language in ("English", "French", "Spanish") for n in numbers]
    return prompts + answers + (headers + parts + spaced) * (num_rows // 40)


def build_tokenizer(num_rows: int = 8_000) -> Tokenizer:
    """The BPE; special tokens at the end of the vocabulary as in the release."""
    texts = training_texts(num_rows)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=16,
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise SystemExit(f"the vocabulary has {tokenizer.get_vocab_size()} entries, wanted {VOCAB_SIZE}: the text has too few words")
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
