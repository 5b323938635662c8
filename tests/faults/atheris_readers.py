"""Coverage-guided fuzzing of the readers of foreign bytes: `python -m tests.faults.atheris_readers SECONDS` (needs `pip install atheris`).

Inputs are files that libFuzzer invents, beginning with good ones; the first byte chooses the reader: safetensors, strict JSON, strict YAML. Anything
but a value or this library's one-line errors ends it with the input that did it.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gptoss_jax.checkpoint.safetensors_io", "gptoss_jax.strict_yaml", "json", "yaml"]):
    from gptoss_jax.checkpoint.safetensors_io import load_json
    from gptoss_jax.strict_yaml import parse_yaml

from gptoss_jax.errors import GptOssError
from tests.faults.headers import check, damaged

PLACE = Path(tempfile.mkdtemp())
YAML = b"extends: base.yaml\noptimizer: {learning_rate: 1e-5}\nfreeze: ['*.router.*']\nquant:\n  format: mxfp4\n"


def one_input(data: bytes) -> None:
    kind, content = data[:1], data[1:]
    try:
        if kind == b"j":
            load_json(content, "x.json")
        elif kind == b"y":
            parse_yaml(content.decode("utf-8", "replace"), "x.yaml")
        else:
            check(content, PLACE / "x.safetensors")
    except GptOssError as error:
        assert "\n" not in str(error), error


if __name__ == "__main__":
    import random

    corpus = PLACE / "corpus"
    corpus.mkdir()
    rng = random.Random(0)
    for number in range(50):
        (corpus / str(number)).write_bytes(b"s" + damaged(rng))
    (corpus / "y").write_bytes(b"y" + YAML)
    (corpus / "j").write_bytes(b'j{"a": [1, -2.5e3, true, null, "\\u00e9"]}')
    atheris.Setup([sys.argv[0], f"-max_total_time={int(sys.argv[1])}", "-max_len=2000", "-rss_limit_mb=2048", str(corpus)], one_input)
    atheris.Fuzz()
