"""A short run of the header fuzz, and that it would notice a reader that is too kind. README.md has the commands for long ones."""

import pytest

from gptoss_jax.checkpoint import safetensors_io
from tests.faults.headers import fuzz


def test_damaged_headers_are_refused_in_one_line_or_read_as_the_library_reads_them(tmp_path):
    seen = fuzz(1000, 1, tmp_path)
    assert seen["refused"] > 500 and seen["accepted"] > 20


def test_the_fuzz_notices_a_reader_that_is_too_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_naturals", lambda value: isinstance(value, list))
    with pytest.raises(AssertionError, match="of seed 1"):
        fuzz(1000, 1, tmp_path)
