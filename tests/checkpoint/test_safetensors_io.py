"""Our reader accepts what the library writes and refuses every damaged file; the library reads what our writer writes."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from gptoss_jax.checkpoint import safetensors_io
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from gptoss_jax.errors import CorruptError


def raw_file(path, header, payload=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)
    return path


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(tmp_path):
    tensors = {
        "u8": torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4),
        "bf16": torch.randn(5, 7).to(torch.bfloat16),
        "f32": torch.randn(3),
        "e4m3": torch.randn(2, 8).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        array = file.array(name)
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else float(array) == 2.5
    assert file.array("e4m3").dtype == ml_dtypes.float8_e4m3fn and file.array("bf16").dtype == ml_dtypes.bfloat16


def test_unaligned_and_unsorted_files_are_legal(tmp_path):
    payload = b"\x07" + np.float32(1.5).tobytes()
    path = raw_file(tmp_path / "x.safetensors", {"b": entry("F32", [1], 1, 5), "a": entry("U8", [1], 0, 1)}, payload)
    assert SafetensorsFile(path).array("b")[0] == 1.5


def test_the_library_reads_what_we_write(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "z.u8": rng.integers(0, 256, (3, 5), np.uint8),
        "a.bf16": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16).T,  # not contiguous: safetensors 0.8.0 writes such arrays wrongly
        "b.e4m3": rng.normal(size=(2, 3)).astype(ml_dtypes.float8_e4m3fn),
        "c.f32": np.float32(rng.normal(size=7)),
    }
    spec = {name: (safetensors_io.DTYPE_NAMES[array.dtype], array.shape) for name, array in arrays.items()}
    path = tmp_path / "x.safetensors"
    with SafetensorsWriter(path, spec) as writer:
        for name in reversed(list(arrays)):  # tensors may come in any order
            writer.write(name, arrays[name])
    loaded = load_file(path)
    for name, array in arrays.items():
        assert np.array_equal(loaded[name].view(torch.uint8).numpy().tobytes(), np.ascontiguousarray(array).tobytes()), name
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()  # the library leaves 0600: other users could not serve the model


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_file_is_never_left_incomplete_in_silence(tmp_path):
    with pytest.raises(ValueError, match="not written in full"), SafetensorsWriter(tmp_path / "x", {"a": ("U8", (2,)), "b": ("U8", (2,))}) as writer:
        writer.write("a", np.zeros(2, np.uint8))
    with pytest.raises(ValueError, match="announced"), SafetensorsWriter(tmp_path / "y", {"a": ("U8", (2,))}) as writer:
        writer.write("a", np.zeros(2, np.int8))
    with pytest.raises(ValueError, match=r"not written in full: \['a'\]"), SafetensorsWriter(tmp_path / "z", {"a": ("U8", (4, 2))}) as writer:
        writer.write("a", np.zeros((2, 2), np.uint8), 1)
    with pytest.raises(ValueError, match="from row 3 on"), SafetensorsWriter(tmp_path / "v", {"a": ("U8", (4, 2))}) as writer:
        writer.write("a", np.zeros((2, 2), np.uint8), 3)


@pytest.mark.parametrize("shape", [(7, 3, 2), (7,)])
def test_rows_may_come_in_groups_in_any_order(shape, tmp_path):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with SafetensorsWriter(tmp_path / "x", {"a": ("F32", shape), "b": ("U8", (3,))}) as writer:
        for start in (4, 0, 2):
            writer.write("a", values[start : start + (3 if start == 4 else 2)], start)
        writer.write("b", np.arange(3, dtype=np.uint8))
    assert np.array_equal(SafetensorsFile(tmp_path / "x").array("a"), values)


GOOD = {"a": entry("U8", [4], 0, 4), "b": entry("BF16", [2, 2], 4, 12)}
BAD_HEADERS = {
    "overlap": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [10], 2, 12)}, "overlap"),
    "hole": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [6], 6, 12)}, "hole"),
    "hole at the start": ({"a": entry("U8", [11], 1, 12)}, "hole"),
    "bytes left over": ({"a": entry("U8", [8], 0, 8)}, "4 bytes follow"),
    "past the end": ({"a": entry("U8", [4], 0, 4), "b": entry("U8", [10], 4, 14)}, "truncated, 2 bytes are missing"),
    "shape larger than span": ({"a": entry("U8", [5], 0, 4), "b": entry("U8", [8], 4, 12)}, "tensor 'a'"),
    "huge shape": ({"a": entry("U8", [2**40, 2**40], 0, 12)}, "tensor 'a'"),
    "negative": ({"a": entry("U8", [-4], 0, 4)}, "tensor 'a'"),
    "descending": ({"a": entry("U8", [4], 12, 0)}, "tensor 'a'"),
    "fraction": ({"a": {"dtype": "U8", "shape": [12.0], "data_offsets": [0, 12]}}, "tensor 'a'"),
    "boolean size": ({"a": {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]}}, "tensor 'a'"),
    "many dims": ({"a": entry("U8", [1] * 64 + [12], 0, 12)}, "tensor 'a'"),
    "unknown dtype": ({"a": entry("F4", [24], 0, 12)}, "unknown dtype 'F4'"),
    "dtype no string": ({"a": {"dtype": ["U8"], "shape": [12], "data_offsets": [0, 12]}}, "dtype"),
    "extra field": ({"a": {**entry("U8", [12], 0, 12), "device": "cpu"}}, "tensor 'a'"),
    "entry no object": ({"a": [1]}, "tensor 'a'"),
    "metadata no strings": ({**GOOD, "__metadata__": {"format": 1}}, "__metadata__"),
    "header no object": (b"[]", "no JSON object"),
    "header no JSON": (b"{'a'", "not valid JSON"),
    "invalid UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "nested deeply": (b"[" * 200_000, "not valid JSON"),
    "name twice": (b'{"a":%b,"a":%b}' % ((b'{"dtype":"U8","shape":[12],"data_offsets":[0,12]}',) * 2), "'a' appears twice"),
}


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_bad_headers_are_refused(fault, tmp_path):
    header, message = BAD_HEADERS[fault]
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(12))
    with pytest.raises(CorruptError) as error:
        SafetensorsFile(path)
    assert message in str(error.value) and "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_every_truncation_is_refused(tmp_path):
    whole = raw_file(tmp_path / "x.safetensors", GOOD, bytes(12))
    content = whole.read_bytes()
    SafetensorsFile(whole)
    for length in range(len(content)):
        whole.write_bytes(content[:length])
        with pytest.raises(CorruptError, match=r"x\.safetensors"):
            SafetensorsFile(whole)
    whole.write_bytes(content + b"\0")
    with pytest.raises(CorruptError, match="1 bytes follow"):
        SafetensorsFile(whole)


def test_lying_header_lengths_allocate_nothing(tmp_path):
    for length in (2**63, 2**40, 100_000_001, 1000):
        with pytest.raises(CorruptError, match="header claims"):
            SafetensorsFile(raw_file(tmp_path / "x.safetensors", GOOD, bytes(12), length))


RANGES = [
    ((0, 7), (0, 300), (0, 90)), ((2, 5), (0, 300), (0, 90)), ((2, 5), (100, 300), (0, 90)), ((6, 7), (299, 300), (89, 90)),
    ((1, 4), (0, 300), (30, 61)), ((3, 3), (0, 300), (0, 90)),
]  # fmt: skip


@pytest.mark.parametrize("near, span", [(1, 1), (400, 3000), (1 << 20, 1 << 20)])
@pytest.mark.parametrize("ranges", RANGES)
def test_a_slice_is_that_of_the_mapped_tensor(ranges, near, span, tmp_path, monkeypatch):
    """Read stretch by stretch, or with what lies between them: rows of 360 bytes, matrices of 108,000."""
    monkeypatch.setattr(safetensors_io, "NEAR_BYTES", near)
    monkeypatch.setattr(safetensors_io, "SPAN_BYTES", span)
    values = np.random.default_rng(0).standard_normal((7, 300, 90)).astype(np.float32)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"pad": ("U8", (3,)), "x": ("F32", values.shape)}) as writer:
        writer.write("x", values)
        writer.write("pad", np.zeros(3, np.uint8))
    ranges = tuple(slice(*part) for part in ranges)
    found = SafetensorsFile(path).read("x", ranges)
    assert found.flags.owndata and found.flags.writeable and np.array_equal(found, values[ranges])


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"x": ("U8", (1 << 16,))}) as writer:
        writer.write("x", np.ones(1 << 16, np.uint8))
    file = SafetensorsFile(path)
    with path.open("r+b") as handle:
        handle.truncate(40_000)
    with pytest.raises(CorruptError, match=r"a\.safetensors: truncated while it was read, at byte 40000"):
        file.read("x", (slice(0, 1 << 16),))
