"""Configs are strict: what is misspelt, doubled or ambiguous is refused with file, line and key."""

import pytest

from gptoss_jax.errors import UsageError
from gptoss_jax.quant import get_estimator
from gptoss_jax.training.config import TrainConfig, parse
from gptoss_jax.training.yaml_config import dump_config, load_config


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def refusal(path, *overrides) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_recipe():
    config = TrainConfig()
    assert (config.optimizer.learning_rate, config.schedule.min_ratio, config.schedule.warmup_ratio, config.clip) == (2e-5, 0.1, 0.03, 1.0)
    assert (config.batch.rows, config.data.row_length, config.optimizer.weight_decay, config.router_aux_loss_coef) == (32, 4096, 0.0, 0.0)
    assert config.master_dtype == "float32" and config.compute_dtype == "bfloat16" and config.quant is None


def test_dump_reads_back_equal(write):
    path = write("steps: 7\nquant: {format: nvfp4, rules: ['*.mlp.experts.*_proj']}\nfreeze: ['*.router.*']\noptimizer: {learning_rate: 3e-6}\n")
    config = load_config(path)
    assert load_config(write(dump_config(config), "resolved.yaml")) == config


def test_estimators_are_named_or_written_out_and_read_back_equal(write):
    short = load_config(None, ["quant={format: mxfp4, estimator: dge}"])
    assert short.quant.estimator == get_estimator("dge") and hash(short)
    assert load_config(None, ["quant={format: mxfp4, estimator: {name: dge, k: 5}}"]) == short
    assert load_config(write(dump_config(short))) == short and "k: 5" in dump_config(short)  # what is stored does not depend on defaults
    plain = load_config(None, ["quant={format: nvfp4}"])
    assert plain.quant.estimator == get_estimator("ste") and "estimator: ste" in dump_config(plain)
    for text, message in (
        ("dgee", "quant.estimator = 'dgee': unknown estimator 'dgee'; nearest is 'dge'"),
        ("{name: dge, kk: 5}", "has no hyperparameter 'kk'; it has k, c"),
        ("{name: trust, T: -1}", "T must lie in [0, 1000], not -1"),
        ("3", "give a name, or {name: ..., hyperparameter: ...}"),
    ):
        assert message in refusal(None, f"quant={{format: mxfp4, estimator: {text}}}")


def test_scientific_notation_is_a_number(write):
    assert load_config(write("optimizer:\n  learning_rate: 1e-5\n  eps: 1E-9\n")).optimizer.learning_rate == 1e-5


@pytest.mark.parametrize("key", ["steps", "data.packing", "clip"])
@pytest.mark.parametrize("value", ["no", "yes", "on", "'true'", "'3'", "1:30", "0x10", "1_000"])
def test_yaml_11_spellings_are_neither_booleans_nor_numbers(key, value):
    assert f"{key} = {value.strip(chr(39))!r}" in refusal(None, f"{key}={value}")


def test_duplicate_key_is_refused_with_both_lines(write):
    message = refusal(write("steps: 3\noptimizer:\n  learning_rate: 1e-5\n  b1: 0.9\n  learning_rate: 2e-5\n"))
    assert "run.yaml:5" in message and "'optimizer.learning_rate'" in message and "line 3" in message


def test_unknown_key_names_the_nearest_and_its_line(write):
    message = refusal(write("steps: 3\noptimizer:\n  learnin_rate: 1e-5\n"))
    assert "run.yaml:3" in message and "'optimizer.learnin_rate'" in message and "did you mean 'optimizer.learning_rate'" in message
    assert "'quant.scale_rul'" in refusal(None, "quant={format: mxfp4, scale_rul: floor}")
    assert "did you mean 'master_dtype'" in refusal(None, "master_dtyp=float32")


@pytest.mark.parametrize(
    "text, fragment",
    [
        ("steps: -1", "steps = -1"),
        ("steps: 2.5", "steps = 2.5"),
        ("optimizer: {learning_rate: .inf}", "optimizer.learning_rate"),
        ("master_dtype: float16", "master_dtype = 'float16'"),
        ("optimizer: {first_moment: factored}", "optimizer.first_moment = 'factored'"),
        ("optimizer: {master_residual: int8}", "belongs to master_dtype bfloat16, not float32"),
        ("quant: {format: int4}", "quant"),
        ("quant: {format: mxfp4, scale_rule: round}", "quant.scale_rule = 'round'"),
        ("quant: {format: nvfp4, scale_rule: rceil}", "quant.scale_rule"),
        ("steps: 3\nepochs: 1", "exclude each other"),
        ("batch: {rows: 6, accumulation: 4}", "not a multiple"),
        ("batch: {rows: 6, accumulation: 2}\nmesh: {fsdp: 2}", "does not divide among mesh.data * mesh.fsdp * mesh.expert = 2"),
        ("batch: {rows: 4}\nmesh: {data: 2, expert: 4, tensor: 2, context: 2}", "does not divide among mesh.data * mesh.fsdp * mesh.expert = 8"),
        ("data: {row_length: 1000}\nmesh: {context: 16}", "row_length = 1000 does not divide by mesh.context = 16"),
        ("- 1", "mapping"),
        ("steps: *a", ":1: "),
        ("steps: &a 3", "anchors"),
        ("steps: !!python/object/apply:os.system ['true']", ":1: "),
        ("steps: [1", ":1: "),
        ("\tsteps: 1", ":1: "),
        ("1: 2", "keys must be names"),
        ("x" * 1_000_001, "larger than"),
    ],
)
def test_bad_values_are_refused_in_one_line(write, text, fragment):
    assert fragment in refusal(write(text))


def test_missing_and_binary_files(tmp_path, write):
    assert "No such file" in refusal(tmp_path / "none.yaml")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in refusal(tmp_path / "bin.yaml")


def test_extends_and_overrides_go_over_the_file(write):
    write("steps: 10\noptimizer: {learning_rate: 2e-5, b1: 0.8}\nquant: {format: mxfp4, scale_rule: floor}\n", "base.yaml")
    path = write("extends: base.yaml\nsteps: 20\nquant: {format: nvfp4}\n")
    config = load_config(path, ["optimizer.learning_rate=1e-4", "data.eval=some/where"])
    assert (config.steps, config.optimizer.b1, config.optimizer.learning_rate, config.data.eval) == (20, 0.8, 1e-4, "some/where")
    # a section of another format replaces the old one, whose scale_rule would be unknown to it
    assert config.quant.format == "nvfp4"
    assert load_config(path, ["quant=null"]).quant is None
    assert "section.key=value" in refusal(path, "steps")
    assert "extends itself" in refusal(write("extends: run.yaml"))


def test_length_in_steps_follows_from_epochs():
    config = parse({"batch": {"rows": 4}, "epochs": 2.5})
    assert config.with_steps(num_rows=42).steps == 26 and config.with_steps(num_rows=1).steps == 1
    assert parse({"batch": {"rows": 4}}).with_steps(40).steps == 10
    assert parse({"steps": 3}).with_steps(40).steps == 3
