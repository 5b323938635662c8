"""What programs may rely on: the names of the package, importable one by one, and a package that says what it lacks."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import gptoss_jax

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("folder", gptoss_jax.PUBLIC)
def test_public_names_are_those_of_their_folder(folder):
    module = importlib.import_module(f"gptoss_jax.{folder}")
    for name in gptoss_jax.PUBLIC[folder]:
        assert getattr(gptoss_jax, name) is getattr(module, name)
        assert name in gptoss_jax.__all__ and name in dir(gptoss_jax)
        assert getattr(module, name).__doc__, name


def test_public_names_are_the_published_ones():
    names = sorted(name for names in gptoss_jax.PUBLIC.values() for name in names)
    assert names == sorted(set(names)) and " ".join(names) == (
        "Batch BatchStream DEFAULT_RULES GptOssConfig Mxfp4 Nvfp4 QuantPolicy ShardingRules Shardings TrainConfig TrainState abstract_params barrier "
        "batch_sharding code_hashes compute_logits cross_entropy_sum default_policy distribution encode_conversations export_hf fake_quant forward "
        "get_format init_params init_state initialize is_first load_balancing_loss load_params load_rows load_tokenizer local_rows logical_axes "
        "make_capture_step make_eval_step make_expert_quant make_mesh make_train_step mxfp4 nvfp4 one_pass open_checkpoint pack param_shardings "
        "place_rows plain_cast replicated run_stage verify_dir"
    )


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'forwrad'"):
        gptoss_jax.forwrad  # noqa: B018


WITHOUT = """
import importlib.metadata, sys
block, arguments = set(sys.argv[1].split(",")), sys.argv[2:]
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in block:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def version(name, found=importlib.metadata.version):
    if name in block:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
sys.meta_path.insert(0, Blocked())
importlib.metadata.version = version
from gptoss_jax.cli import main
sys.exit(main(arguments))
"""


def bare(*arguments, block=()):
    """The command line in a Python without site packages, or in one that lacks those of `block`."""
    options = () if block else ("-S",)
    return subprocess.run([sys.executable, *options, "-c", WITHOUT, ",".join(block), *arguments], cwd=ROOT, capture_output=True, text=True)


def test_package_without_its_dependencies_imports_and_says_what_it_lacks():
    """As after `pip install --no-deps` into a container that brings nothing."""
    done = bare("env")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name in ("jax", "flax", "orbax-checkpoint", "tyro", "numpy"):
        assert f"  {name:<18} MISSING" in done.stdout
    assert "required packages missing or unfit: pip install 'jaxlib' 'jax>=0.10.0'" in done.stdout


def test_single_missing_package_is_named():
    done = bare("env", block=("grain", "tyro"))
    assert done.returncode == 1 and "2 of the required packages missing or unfit: pip install" in done.stdout and "backend cpu" in done.stdout
    done = bare("sft", "data.train=x", block=("tyro",))
    assert done.returncode == 1 and done.stderr == "gptoss-jax sft: the package 'tyro' is not installed; `gptoss-jax env` lists what is missing\n"


def test_unfit_version_is_named():
    from gptoss_jax.cli.env import _unfit

    assert _unfit("jax>=0.10.0", "0.6.2") == "  UNFIT: needs >=0.10.0" and _unfit("jax>=0.10.0", "0.12.0.1") == ""
