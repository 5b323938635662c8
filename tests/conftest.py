"""Eight CPU devices and a compilation cache that outlives the run, before anything touches JAX."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
CACHE = Path(os.environ.get("GPTOSS_JAX_TEST_CACHE", Path(tempfile.gettempdir()) / "gptoss_jax_test_cache"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def _drop_compiled_programs():
    """Compiled programs stay in memory for good: without this a worker grew to 6.6 GiB. Only when they are many: tracing again takes time."""
    yield
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc/self/statm").exists() else 0
    if resident > 2 << 30:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_config():
    """gpt-oss with all dimensions different and no square kernel, so that no transpose can hide."""
    from gptoss_jax.model import GptOssConfig
    from gptoss_jax.model.config import RopeConfig

    return GptOssConfig(
        vocab_size=160,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_local_experts=8,
        num_experts_per_tok=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        sliding_window=7,
        max_position_embeddings=512,
        rope=RopeConfig(original_max_position_embeddings=64, factor=4.0),
    )
