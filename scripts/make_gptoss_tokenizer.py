"""Writes the tokenizer of the gpt-oss releases (tokenizer.json, tokenizer_config.json) from a file of OpenAI's byte-pair ranks.

    python scripts/make_gptoss_tokenizer.py OUT_DIR [o200k_base.tiktoken[.gz]]

Without a file, the copy inside the package bpe-openai is used (`pip install bpe-openai`).
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from gptoss_jax.data.release_tokenizer import write_tokenizer
from gptoss_jax.errors import GptOssError, UsageError


def packaged_ranks() -> Path:
    spec = importlib.util.find_spec("bpe_openai")
    if spec is None:
        raise UsageError("no ranks: give the path of o200k_base.tiktoken, or `pip install bpe-openai`, which carries a copy")
    return Path(spec.origin).parent / "data" / "o200k_base.tiktoken.gz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("ranks", type=Path, nargs="?", metavar="o200k_base.tiktoken")
    args = parser.parse_args()
    try:
        write_tokenizer(args.ranks or packaged_ranks(), args.out)
    except GptOssError as error:
        print(f"make_gptoss_tokenizer: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{args.out}/tokenizer.json, tokenizer_config.json")


if __name__ == "__main__":
    main()
