"""Properties over generated configs, YAML texts and tensors: a value that comes back equal, or one line; never another exception."""

import string

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFile, SafetensorsWriter, load_json
from gptoss_jax.errors import CorruptError, UsageError
from gptoss_jax.strict_yaml import parse_yaml
from gptoss_jax.training.config import Mxfp4Quant, TrainConfig, parse
from gptoss_jax.training.yaml_config import dump_config

SHORT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ---- configs ----------------------------------------------------------------------------------------------------------------
LEAVES = {
    "steps": st.integers(1, 10**6), "seed": st.integers(0, 2**32 - 1), "clip": st.floats(1e-6, 1e6), "keep": st.integers(1, 9),
    "master_dtype": st.sampled_from(["float32", "bfloat16"]), "remat": st.sampled_from(["none", "products", "layer"]),
    "freeze": st.lists(st.text(string.printable, max_size=9).filter(lambda text: "@" not in text), max_size=3),
    "output": st.none() | st.text(max_size=9).filter(lambda text: "@" not in text),
    "eval_every": st.none() | st.integers(1, 99), "router_aux_loss_coef": st.floats(0, 9), "spike_sigmas": st.none() | st.floats(1e-3, 99),
    "optimizer": st.fixed_dictionaries({}, optional={"learning_rate": st.floats(1e-12, 1), "b1": st.floats(0, 0.999), "eps": st.floats(1e-30, 1)}),
    "schedule": st.fixed_dictionaries({}, optional={"min_ratio": st.floats(0, 1), "warmup_ratio": st.floats(0, 1)}),
    "quant": st.none()
    | st.fixed_dictionaries({"format": st.just("mxfp4")}, optional={"scale_rule": st.sampled_from(["rceil", "floor", "even", "mse"])})
    | st.fixed_dictionaries({"format": st.just("nvfp4")}, optional={"global_scale": st.sampled_from(["pow2", "exact"])}),
}  # fmt: skip
CONFIGS = st.fixed_dictionaries({}, optional=LEAVES)
KEYS = st.sampled_from([*TrainConfig.model_fields, *Mxfp4Quant.model_fields, "rows", "name", "learning_rate", "train", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


@SHORT
@given(CONFIGS)
@example({"output": "1e5"})
@example({"output": "no", "freeze": ["010", "12:30:45", "", "~", ".5", "2026-11-25"]})
def test_a_valid_config_comes_back_equal_from_its_dump(raw):
    config = parse(raw)
    values, _ = parse_yaml(dump_config(config), "dump")
    assert parse(values) == config == parse(config.to_dict())


@SHORT
@given(st.dictionaries(KEYS, JSON, max_size=4))
@example({"quant": {"format": "mxfp4", "activations": 5}})
@example({"quant": {"format": "mxfp4", "activations": {"name": [1]}}})
@example({"quant": {"format": "mxfp4", "activations": {"name": "mxfp4", "scale_rule": [1]}}})
@example({"quant": {"format": "mxfp4", "estimator": {"name": [1]}}})
@example({"quant": {"format": "mxfp4", "rules": [1]}})
@example({"optimizer": {"weight_decay": 1e999}})
@example({"data": {"train": [{"path": 1}]}})
def test_any_values_make_a_config_or_one_line(raw):
    try:
        assert isinstance(parse(raw), TrainConfig)
    except UsageError as error:
        assert "\n" not in str(error) and str(error).startswith("config")


# ---- texts ------------------------------------------------------------------------------------------------------------------
TOKENS = st.sampled_from(["a", "b:", "- ", "  ", "\n", "\t", "{", "}", "[", "]", ",", ":", "1e-5", "no", "010", "&x ", "*x",
                          "!!python/name:os.system ", "'", '"', "|", ">", "#", "? ", "---", "...", "%YAML 1.1", "\ufeff", "\x00",
                          "\x85", "<<: ", "~", "é"])  # fmt: skip


@settings(SHORT, max_examples=200)
@given(st.lists(TOKENS, max_size=25).map("".join) | st.text(max_size=40))
@example("a: " + "[" * 5000)
@example("[" * 5000)
@example("a: " + "1" * 5000)
def test_any_text_is_yaml_of_plain_values_or_one_line(text):
    try:
        value, _ = parse_yaml(text, "x.yaml")
        assert isinstance(value, dict | list | str | int | float | bool | None)
    except UsageError as error:
        assert str(error).startswith("x.yaml") and "\n" not in str(error)


@SHORT
@given(st.binary(max_size=40) | st.lists(TOKENS, max_size=20).map("".join))
@example(b"[" * 100_000)
@example("1" * 5000)
@example(b"\xff\xfe{\x00}\x00")
def test_any_bytes_are_json_or_one_line(text):
    try:
        load_json(text, "x.json")
    except CorruptError as error:
        assert str(error).startswith("x.json") and "\n" not in str(error)


# ---- tensors ----------------------------------------------------------------------------------------------------------------
SPECS = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 5), max_size=4).map(tuple))


@SHORT
@given(st.data(), st.dictionaries(st.text(max_size=6), SPECS, max_size=5))
def test_tensors_of_any_shape_and_dtype_come_back_whole_and_in_parts(tmp_path_factory, data, tensors):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    rng = np.random.default_rng(0)
    arrays = {}
    for name, (dtype, shape) in tensors.items():
        arrays[name] = rng.integers(0, 2, (*shape, DTYPES[dtype].itemsize), np.uint8).view(DTYPES[dtype]).reshape(shape)
    with SafetensorsWriter(path, tensors) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    file = SafetensorsFile(path)
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert file.array(name).dtype == array.dtype and file.array(name).shape == array.shape and file.array(name).tobytes() == array.tobytes()
        ends = [sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in array.shape]
        ranges = tuple(slice(*pair) for pair in ends)
        assert file.read(name, ranges).tobytes() == np.ascontiguousarray(array[ranges]).tobytes()


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_names_that_are_no_text_are_refused(name, tmp_path):
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, {name: ("BF16", (2,))}) as writer:
        writer.write(name, np.zeros(2, ml_dtypes.bfloat16))
    with pytest.raises(CorruptError, match="half a character in the name") as error:
        SafetensorsFile(path)
    assert str(error.value).encode()
