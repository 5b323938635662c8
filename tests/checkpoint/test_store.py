"""An index must describe its files exactly and may not lead out of its directory."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_jax.checkpoint import open_checkpoint
from gptoss_jax.checkpoint import store as store_module
from gptoss_jax.checkpoint.safetensors_io import SafetensorsWriter
from gptoss_jax.checkpoint.store import open_store
from gptoss_jax.errors import CorruptError
from tests.checkpoint import builders

INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


@pytest.fixture
def sharded(tensors, tmp_path):
    return builders.write(tmp_path / "m", tensors, {**builders.CONFIG, "quantization_config": builders.QUANTIZATION}, shards=3)


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index)
    (directory / INDEX).write_text(json.dumps(index))


def rename_in_map(new):
    return lambda index: index["weight_map"].update({key: new for key, file in index["weight_map"].items() if file == SECOND})


def move_out(directory):
    """The second shard lies beside the directory, and the index says so."""
    (directory.parent / "other").mkdir()
    shutil.move(directory / SECOND, directory.parent / "other" / SECOND)


def path_traversal(directory):
    move_out(directory)
    edit_index(directory, rename_in_map(f"../other/{SECOND}"))


def absolute_path(directory):
    move_out(directory)
    edit_index(directory, rename_in_map(str(directory.parent / "other" / SECOND)))


def link_out(directory):
    move_out(directory)
    (directory / SECOND).symlink_to(directory.parent / "other" / SECOND)


def truncated_shard(directory):
    content = (directory / SECOND).read_bytes()
    (directory / SECOND).write_bytes(content[:-7])


def tensor_in_two_shards(directory):
    path = directory / SECOND
    save_file({**load_file(path), "lm_head.weight": torch.zeros(builders.V, builders.D, dtype=torch.bfloat16)}, path, {"format": "pt"})


def unlisted_tensor(directory):
    path = directory / SECOND
    save_file({**load_file(path), "surprise": torch.zeros(3)}, path, {"format": "pt"})


def single_beside_index(directory):
    save_file({"x": torch.zeros(2)}, directory / "model.safetensors")


def duplicate_key(directory):
    text = (directory / INDEX).read_text()
    (directory / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "model-00003-of-00003.safetensors", ', 1))


FAULTS = {
    "path traversal": (path_traversal, "is not a plain file name"),
    "absolute path": (absolute_path, "is not a plain file name"),
    "link out of the directory": (link_out, "links to a file outside"),
    "missing shard": (lambda d: (d / SECOND).unlink(), f"file {SECOND} is missing"),
    "truncated shard": (truncated_shard, "truncated, 7 bytes are missing"),
    "tensor in two shards": (tensor_in_two_shards, "tensor 'lm_head.weight' is in both"),
    "tensor not listed": (unlisted_tensor, f"'surprise' of {SECOND} is not listed"),
    "listed tensor in no file": (lambda d: edit_index(d, lambda i: i["weight_map"].update(ghost=SECOND)), "'ghost' is in no file"),
    "wrong shard": (lambda d: edit_index(d, lambda i: i["weight_map"].update({"lm_head.weight": SECOND})), f"not in {SECOND}"),
    "wrong total": (lambda d: edit_index(d, lambda i: i["metadata"].update(total_size=5)), "metadata.total_size is 5"),
    "no map": (lambda d: edit_index(d, lambda i: i.pop("weight_map")), "weight_map must map"),
    "map of numbers": (lambda d: edit_index(d, lambda i: i.update(weight_map={"a": 1})), "weight_map must map"),
    "index no JSON": (lambda d: (d / INDEX).write_text("nope"), "not valid JSON"),
    "duplicate key": (duplicate_key, "'lm_head.weight' appears twice"),
    "single file beside the index": (single_beside_index, "both model.safetensors and"),
    "no index": (lambda d: (d / INDEX).unlink(), "neither model.safetensors nor"),
}


def test_the_untouched_directory_opens(sharded):
    assert len(open_checkpoint(sharded).store.files) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_indexes_are_refused(fault, sharded):
    break_it, message = FAULTS[fault]
    break_it(sharded)
    with pytest.raises(CorruptError) as error:
        open_checkpoint(sharded)
    assert message in str(error.value) and "\n" not in str(error.value) and sharded.name in str(error.value)


def test_a_link_inside_the_directory_is_followed(sharded):
    (sharded / SECOND).rename(sharded / "data.part")
    (sharded / SECOND).symlink_to("data.part")
    open_checkpoint(sharded)


@pytest.mark.parametrize("shape", [(7, 300), (5,), (), (0, 4), (1, 2000)])
def test_chunks_are_the_tensor(shape, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 3000)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with SafetensorsWriter(tmp_path / "model.safetensors", {"x": ("F32", shape)}) as writer:
        writer.write("x", values)
    parts = list(open_store(tmp_path).chunks("x"))
    assert b"".join(part.tobytes() for part in parts) == values.tobytes()
    assert shape != (7, 300) or [len(part) for part in parts] == [2, 2, 2, 1]
