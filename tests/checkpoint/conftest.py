import pytest

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
