"""The tokenizer of the gpt-oss releases, made from OpenAI's list of byte-pair ranks: no hub needed.

`o200k_base.tiktoken` (3.6 MB, one `base64(token) rank` a line) is what tiktoken downloads; the packages bpe-openai (PyPI, gzipped) and gpt-tokenizer
(npm) carry copies. What is made of it is, byte for byte, the tokenizer.json (`TOKENIZER_SHA256`; written by tokenizers 0.23) and the
tokenizer_config.json of openai/gpt-oss-20b.

A rank list says what tokens there are, Hugging Face's BPE which pairs merge, so every way to cut a token into two tokens is a merge, in the order of
the rank of the result: 446,189 of them.
"""

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from gptoss_jax.errors import CorruptError, UsageError

RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + SUFFIX,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + SUFFIX,
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip
NAMED = {
    199998: "startoftext", 199999: "endoftext", 200002: "return", 200003: "constrain", 200005: "channel", 200006: "start", 200007: "end",
    200008: "message", 200012: "call", 200018: "endofprompt",
}  # fmt: skip
SPECIAL = {i: f"<|{NAMED.get(i, f'reserved_{i}')}|>" for i in range(199998, 200019)}


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary: itself, or the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Token -> rank of `o200k_base.tiktoken`, also gzipped. UsageError: no such file. CorruptError: it is another one."""
    if not Path(path).is_file():
        raise UsageError(f"no such file: {path}")
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise CorruptError(f"{path} is not the o200k_base.tiktoken of OpenAI: its sha256 differs from {RANKS_SHA256}")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}


def make_tokenizer(ranks: dict[bytes, int]) -> Any:
    """A `tokenizers.Tokenizer` with 200,019 entries; rows 200,019 to 201,087 of the model's embedding have no token. Takes a few seconds."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[left], ranks[right], left, right) for left, right in cuts if left in ranks and right in ranks)
        merges += [(names[left], names[right]) for _, _, left, right in pairs]
    vocab = {names[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL.values()])
    return tokenizer


def write_tokenizer(ranks_path: str | Path, directory: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json of the release into `directory`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    make_tokenizer(read_ranks(ranks_path)).save(str(directory / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in SPECIAL.items()},
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": int(1e30),
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
