"""Damaged safetensors files without end: `python -m tests.faults.headers 10000 [seed]`.

Each is a good file in which one to four things were changed, as JSON (dtypes, shapes, offsets, names, values of other types, keys twice) or as bytes
(flipped, cut, inserted, a lying length). Our reader must refuse it in one line that names the file, or accept it; and what it accepts, the
safetensors library must accept too, with the same names, dtypes, shapes and bytes. A header must make it allocate nothing.
"""

import copy
import json
import random
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors

from gptoss_jax.checkpoint.safetensors_io import DTYPES, SafetensorsFile
from gptoss_jax.errors import CorruptError

MAX_GROWTH_BYTES = 64 << 20  # of the process, over any number of headers
PAYLOAD = bytes(range(120))
GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
    "b.weight": {"dtype": "BF16", "shape": [2, 2, 5], "data_offsets": [60, 100]},
    "none": {"dtype": "U8", "shape": [0, 7], "data_offsets": [100, 100]},
    "c": {"dtype": "U8", "shape": [20], "data_offsets": [100, 120]},
}
NUMBERS = (0, 1, 2, 3, 5, 20, 59, 60, 61, 100, 119, 120, 121, -1, -60, 2**31, 2**32 + 60, 2**63, 2**64, 2**64 + 60, 10**30, 1.0, 60.0, 1e308, True)
VALUES = (None, "", "x", [], {}, [[]], {"a": 1}, "60", float("nan"), float("inf"), "\ud800", "../../etc/x", "\0", "a" * 10_000)
NAMES = ("", "a", "c", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "é", "__metadata__", "a" * 5000, "none")


def _one_of(rng: random.Random):
    return rng.choice(NUMBERS if rng.random() < 0.6 else VALUES)


def _change_header(rng: random.Random, header: dict) -> None:
    name = rng.choice(list(header) or ["a"])
    entry = header.get(name)
    kind = rng.randrange(7)
    if kind == 0:
        header.pop(name, None)
    elif kind == 1:
        header[rng.choice(NAMES)] = copy.deepcopy(entry)
    elif kind == 2 or not isinstance(entry, dict) or not entry:
        header[name] = _one_of(rng)
    elif kind == 3:
        entry[rng.choice(["dtype", "shape", "data_offsets", "device", "format"])] = _one_of(rng)
    elif kind == 4:
        entry["dtype"] = rng.choice([*DTYPES, "F4", "F6_E2M3", "f32", "C64"])
    else:
        numbers = entry.get(rng.choice(["shape", "data_offsets"]))
        if isinstance(numbers, list):
            change = rng.randrange(4)
            if change == 0 and numbers:
                numbers[rng.randrange(len(numbers))] = _one_of(rng)
            elif change == 1:
                numbers.append(rng.choice(NUMBERS))
            elif change == 2 and numbers:
                numbers.pop()
            else:
                rng.shuffle(numbers)


def _change_bytes(rng: random.Random, content: bytearray) -> None:
    # most within the header, where structure is
    place = rng.randrange(min(len(content), 400) + 1)
    kind = rng.randrange(6)
    if kind == 0 and place < len(content):
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place:place] = rng.choice([b"{", b"}", b"[" * 1000, b" ", b"\xff", b"\0", b'"', b",", b"1e9", b"\xef\xbb\xbf"])
    elif kind == 2:
        del content[place : place + rng.randrange(1, 40)]
    elif kind == 3:
        del content[len(content) - rng.randrange(1, 130) :]
    elif kind == 4:
        content += bytes(rng.randrange(1, 9))
    else:
        content[:8] = rng.choice([0, 1, 7, 200, 2**20, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1]).to_bytes(8, "little")


def damaged(rng: random.Random) -> bytes:
    """The next file."""
    header = copy.deepcopy(GOOD)
    as_bytes = rng.random()
    for _ in range(rng.randrange(1, 4) if as_bytes < 0.75 else 0):
        _change_header(rng, header)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:  # a key twice
        text = text[:-1] + b', "a": ' + json.dumps(GOOD["a"]).encode() + b"}"
    if rng.random() < 0.05:
        text = rng.choice([b" " + text, json.dumps(header).encode("utf-16"), json.dumps(header).encode("utf-32-le"), text + b"  "])
    content = bytearray(len(text).to_bytes(8, "little") + text + PAYLOAD)
    for _ in range(rng.randrange(1, 4) if as_bytes > 0.6 else 0):
        _change_bytes(rng, content)
    return bytes(content)


def check(content: bytes, path: Path) -> bool:
    """Whether the file is accepted. AssertionError where it should not be, or where its refusal is no clear line."""
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
    except CorruptError as error:
        assert str(path) in str(error) and "\n" not in str(error) and str(error).encode(), error
        return False
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == file.tensors.keys()
    for name, info in file.tensors.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"]), name
        assert content[info.begin : info.end] == bytes(theirs[name]["data"]) and info.nbytes == np.prod(info.shape) * DTYPES[info.dtype].itemsize
    return True


def fuzz(count: int, seed: int, folder: Path) -> Counter:
    """Checks `count` files; how many were accepted and refused."""
    rng, path, seen = random.Random(seed), folder / "x.safetensors", Counter()
    assert check(len(json.dumps(GOOD)).to_bytes(8, "little") + json.dumps(GOOD).encode() + PAYLOAD, path), "the good file"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        content = damaged(rng)
        try:
            seen["accepted" if check(content, path) else "refused"] += 1
        except BaseException as error:
            raise AssertionError(f"file {number} of seed {seed}: {error!r}: {content[:600]!r}") from error
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    assert growth < MAX_GROWTH_BYTES, f"{growth} bytes were allocated"
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(dict(fuzz(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, Path(place))))
