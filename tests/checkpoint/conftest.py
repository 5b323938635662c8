import shutil

import pytest

from gptoss_jax.checkpoint import export_hf, load_params
from gptoss_jax.formats import Mxfp4
from tests.checkpoint import builders


@pytest.fixture(scope="session")
def tensors():
    """The tiny model in HF's MXFP4 layout. Tests copy the dict before they change it."""
    return builders.mxfp4_tensors()


@pytest.fixture(scope="session")
def expected(tensors):
    return builders.expected_params(tensors)


@pytest.fixture(scope="session")
def mxfp4_dir(tensors, tmp_path_factory):
    config = {**builders.CONFIG, "quantization_config": builders.QUANTIZATION}
    return builders.write(tmp_path_factory.mktemp("source") / "mxfp4", tensors, config)


@pytest.fixture(scope="session")
def good_export(mxfp4_dir, tmp_path_factory):
    """Four shards with tokenizer files, exported from the random MXFP4 checkpoint."""
    root = tmp_path_factory.mktemp("good")
    source = shutil.copytree(mxfp4_dir, root / "source")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        (source / name).write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config, params = load_params(source)
    return export_hf(root / "export", config, params, format=Mxfp4(), source_dir=source, max_shard_bytes=160_000)


@pytest.fixture
def directory(good_export, tmp_path):
    """A copy of the good export to break."""
    return shutil.copytree(good_export, tmp_path / "export")
