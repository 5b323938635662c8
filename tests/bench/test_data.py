"""The benchmark of the data pipeline runs, on few rows and the small tokenizer; its conversations are the same for the same seed."""

import json
from pathlib import Path

import pytest

from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_rows, load_tokenizer
from scripts.bench import conversations, data


def test_one_pass_is_measured_on_seeded_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "NUM_BATCHES", 2)  # grain's shuffle takes 0.1 s for a batch out of so few rows
    tokenizer = load_tokenizer(NANO)
    for name in ("a", "b"):
        conversations.write(tmp_path / f"{name}.jsonl", 150, tokenizer, seed=3)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = load_rows(tmp_path / "a.jsonl").rows
    assert len({json.dumps(row) for row in rows}) == 150
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    result = data.pipeline_run(tmp_path / "a.jsonl", 120, tokenizer)
    assert result["rows"] == 120 and result["tokens"] > 120 * 100 and result["batches_per_s"] > 0
    assert result["token_arrays_mb"] * 1e6 == pytest.approx(8 * result["tokens"], rel=0.01), "labels are not stored twice"
