"""Ways to change a good export, each a function of the directory: of a tensor, of its shard's header, of a JSON file, of the files.

The index follows a changed tensor, so that only what was meant is wrong.
"""

import json

from safetensors.torch import load_file, save_file

from tests.checkpoint.test_load import set_tensor

INDEX = "model.safetensors.index.json"
MANIFEST = "gptoss_jax_export.json"
EXPERTS = "model.layers.1.mlp.experts."


def shard_of(directory, key):
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][key]


def edit_json(name, change):
    def apply(directory):
        value = json.loads((directory / name).read_text())
        change(value)
        (directory / name).write_text(json.dumps(value))

    return apply


def edit_config(**values):
    """Sets keys of config.json; those set to KeyError go."""

    def change(config):
        config.update(values)
        for key in [key for key, value in values.items() if value is KeyError]:
            del config[key]

    return edit_json("config.json", change)


def edit_rope(**values):
    def change(config):
        config["rope_scaling"].update(values)
        for key in [key for key, value in values.items() if value is KeyError]:
            del config["rope_scaling"][key]

    return edit_json("config.json", change)


def edit_index(change):
    return edit_json(INDEX, change)


def edit_tensor(key, make, metadata=None):
    """Rewrites the shard of `key` with `make(tensor)` in its place, without it where that is None."""

    def apply(directory):
        path = shard_of(directory, key)
        before = load_file(path)
        after = set_tensor(key, make)(before)
        save_file(after, path, {"format": "pt"} if metadata is None else metadata)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors.values())
        edit_index(lambda index: index["metadata"].update(total_size=index["metadata"]["total_size"] + size(after) - size(before)))(directory)
        if key not in after:
            edit_index(lambda index: index["weight_map"].pop(key))(directory)

    return apply


def drop(*keys):
    return together(*(edit_tensor(key, lambda t: None) for key in keys))


def add(key, value, beside="lm_head.weight"):
    """One more tensor in the shard of `beside`, in the index too."""

    def apply(directory):
        path = shard_of(directory, beside)
        save_file({**load_file(path), key: value}, path, {"format": "pt"})

        def list_it(index):
            index["weight_map"][key] = path.name
            index["metadata"]["total_size"] += value.numel() * value.element_size()

        edit_index(list_it)(directory)

    return apply


def move(key, beside):
    """Takes a tensor to the shard in which `beside` lies, in the index too."""

    def apply(directory):
        path, other = shard_of(directory, key), shard_of(directory, beside)
        assert path != other
        tensors = load_file(path)
        save_file({**load_file(other), key: tensors.pop(key)}, other, {"format": "pt"})
        save_file(tensors, path, {"format": "pt"})
        edit_index(lambda index: index["weight_map"].update({key: other.name}))(directory)

    return apply


def copy_to_shard_of(key, beside):
    """The same tensor a second time, in another shard; the index names the first."""

    def apply(directory):
        path, other = shard_of(directory, key), shard_of(directory, beside)
        save_file({**load_file(other), key: load_file(path)[key]}, other, {"format": "pt"})

    return apply


def edit_header(key, change, payload=lambda content: content):
    """Rewrites the header of the shard of `key` as text, and its payload."""

    def apply(directory):
        path = shard_of(directory, key)
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = change(content[8 : 8 + length].decode())
        path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + payload(content[8 + length :]))

    return apply


def as_json(change):
    def apply(text):
        header = json.loads(text)
        change(header)
        return json.dumps(header)

    return apply


def rename_shard(key, name):
    def apply(directory):
        old = shard_of(directory, key)
        old.rename(directory / name)
        edit_index(lambda index: index["weight_map"].update({k: name for k, file in index["weight_map"].items() if file == old.name}))(directory)

    return apply


def flip_bit(directory):
    path = shard_of(directory, EXPERTS + "gate_up_proj_blocks")
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def drop_metadata(directory):
    path = shard_of(directory, "lm_head.weight")
    save_file(load_file(path), path)


def together(*changes):
    def apply(directory):
        for change in changes:
            change(directory)

    return apply
