"""The nano tokenizer, whose files are package data."""

from pathlib import Path

import pytest

import gptoss_jax
from gptoss_jax.data import load_tokenizer

NANO = Path(gptoss_jax.__file__).parent / "nano"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(NANO)
