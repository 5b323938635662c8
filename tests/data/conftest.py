"""The nano tokenizer, whose files are package data, and the release's, made from its ranks."""

from pathlib import Path

import pytest

import gptoss_jax
from gptoss_jax.data import load_tokenizer
from gptoss_jax.data.release_tokenizer import write_tokenizer
from tests.support import release

NANO = Path(gptoss_jax.__file__).parent / "nano"


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    return release.ranks_file(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="session")
def release_directory(ranks, tmp_path_factory):
    """Takes about three seconds."""
    directory = tmp_path_factory.mktemp("gpt-oss-tokenizer")
    write_tokenizer(ranks, directory)
    return directory


@pytest.fixture(scope="session")
def release_tokenizer(release_directory):
    return load_tokenizer(release_directory)
