"""Every kind of file, directory and hub name gives its rows in order, each with its place; what cannot be read gets one clear line."""

import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest

from gptoss_jax.data import Source, json_rows, load_rows
from gptoss_jax.data.files import read
from gptoss_jax.errors import CorruptError, UsageError

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def row(i):
    return {**ROW, "i": i}


def numbers(path, split=None):
    return [r["i"] for _, r in read(str(path), split)]


def parquet(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), path)


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: '{"about": {"n": [1]}, "data": ' + text + ', "more": 1}'])
def test_json_array_rows_have_their_lines(tmp_path, wrap):
    text = "[\n" + ",\n".join([json.dumps(row(0)), json.dumps(row(1), indent=1), '{"messages": []}', json.dumps(row(3))]) + "\n]\n"
    (tmp_path / "d.json").write_text("\ufeff" + wrap(text))
    loaded = load_rows(tmp_path / "d.json", skip_bad_rows=True)
    assert [r["i"] for r in loaded.rows] == [0, 1, 3]
    line = text.splitlines().index('{"messages": []},') + 1
    assert loaded.problems == [f"{tmp_path}/d.json:{line}: messages is empty"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"i": 0},\n {"i": 1}\n {"i": 2}]', ":3: not JSON: expected a comma or the end of the array at column 2; what follows is not read"),
        ('[{"i": 0},\n {"i": }]', ":2: not JSON: Expecting value at column 8; what follows is not read"),
        ('[{"i": 0},\n {"i": 1, "i": 2}, {"i": 3}]', ':2: the key "i" stands twice in one object'),
        ('[{"i": 0},', ":1: not JSON: Expecting value at column 11"),
        ('[{"i": 0}, ' + "[" * 100_000, ":1: not usable JSON: "),
    ],
)
def test_broken_json_arrays_are_named_by_line(tmp_path, text, problem):
    (tmp_path / "d.json").write_text(text)
    assert any(problem in f":{where.rpartition(':')[2]}: {bad}" for where, bad in read(str(tmp_path / "d.json")) if not isinstance(bad, dict))


def test_an_empty_array_has_no_rows(tmp_path):
    (tmp_path / "d.json").write_text("[ ]")
    with pytest.raises(UsageError, match="has no rows"):
        load_rows(tmp_path / "d.json")


@pytest.mark.parametrize("text", ["", "5", '{"rows": []}', '{"data": {}}', "\x00"])
def test_json_that_holds_no_array_is_refused(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    with pytest.raises(CorruptError) as error:
        load_rows(tmp_path / "d.json")
    assert "\n" not in str(error.value) and "d.json" in str(error.value)


def test_a_line_of_10_mb_is_read_and_one_without_end_is_not(tmp_path, monkeypatch):
    long = {"messages": [ROW["messages"][0], {"role": "assistant", "content": "x" * 10_000_000}]}
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (ROW, long, ROW)))
    assert load_rows(path).rows == [ROW, long, ROW]
    monkeypatch.setattr(json_rows, "MAX_LINE_BYTES", 1 << 20)
    loaded = load_rows(path, skip_bad_rows=True)
    assert loaded.rows == [ROW, ROW] and loaded.problems == [f"{path}:2: the line is longer than 1 MiB"]


def test_a_directory_of_shards_is_read_in_order_of_names(tmp_path):
    for i in (2, 0, 1):
        parquet(tmp_path / "data" / f"train-0000{i}-of-00003.parquet", row(2 * i), row(2 * i + 1))
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.jsonl").write_text("no")
    assert numbers(tmp_path) == [0, 1, 2, 3, 4, 5] == numbers(tmp_path, "train")
    assert [where for where, _ in read(str(tmp_path))][2] == f"{tmp_path}/data/train-00001-of-00003.parquet: row 1"


def test_splits_of_a_directory_must_be_chosen(tmp_path):
    parquet(tmp_path / "train-0.parquet", row(0))
    parquet(tmp_path / "test" / "0.parquet", row(1))
    with pytest.raises(UsageError, match="splits test, train: choose one"):
        numbers(tmp_path)
    with pytest.raises(UsageError, match="there is no 'dev'"):
        numbers(tmp_path, "dev")
    assert numbers(tmp_path, "test") == [1] and numbers(tmp_path, "train") == [0]


def test_two_kinds_of_shards_are_refused(tmp_path):
    parquet(tmp_path / "a.parquet", row(0))
    (tmp_path / "a.jsonl").write_text(json.dumps(row(0)))
    with pytest.raises(UsageError, match=r"holds \.jsonl and \.parquet files"):
        numbers(tmp_path)


def test_hub_names_carry_config_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    one = datasets.Dataset.from_list([row(0), row(1)])

    def load_dataset(*args, split):
        asked.append((*args, split))
        return one if split else datasets.DatasetDict(train=one) if args[0] == "a/one" else datasets.DatasetDict(train=one, test=one)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert numbers("a/b:c@train") == [0, 1] == numbers("a/one") == numbers("a/b", "test")
    assert asked == [("a/b", "c", "train"), ("a/one", None, None), ("a/b", None, "test")]
    with pytest.raises(UsageError, match="a/b has the splits train, test: choose one, as a/b@train"):
        numbers("a/b")


def test_a_hub_name_without_network_gets_one_line_that_says_how(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as error:
        load_rows("nobody/nothing-at-all")
    text = str(error.value)
    assert "HF_HUB_OFFLINE is set" in text and "hf download nobody/nothing-at-all --repo-type dataset" in text and "\n" not in text


@pytest.mark.parametrize("path", ["missing.jsonl", "data/missing.jsonl", "./a/b", "a/b/c", "/a/b", "a b"])
def test_a_path_that_is_no_hub_name_is_no_such_file(path):
    with pytest.raises(UsageError, match="no such file or directory"):
        read(path)


def test_text_of_a_parquet_row_that_is_no_utf8_is_named_and_the_others_are_read(tmp_path):
    parquet(tmp_path / "d.parquet", *(row(i) for i in range(3)))
    table = pyarrow.parquet.read_table(tmp_path / "d.parquet")
    broken = pa.array([b"ok", b"\xff", b"ok"]).view(pa.string())
    pyarrow.parquet.write_table(table.append_column("note", broken), tmp_path / "d.parquet")
    loaded = load_rows(tmp_path / "d.parquet", skip_bad_rows=True)
    assert [r["i"] for r in loaded.rows] == [0, 2]
    assert loaded.problems == [f"{tmp_path}/d.parquet: row 2: not UTF-8 at byte 0 of a text"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_a_file_that_may_not_be_read_gets_one_line(tmp_path, monkeypatch, name):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text("[]")
    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UsageError, match=rf"{name} cannot be read \(Permission denied\)"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.parquet"])
def test_damaged_files_end_in_named_errors(tmp_path, name):
    """Bytes changed, cut and repeated at random: rows, bad rows, or one of our errors, never anything else."""
    path = tmp_path / name
    good = [{**row(i), "text": "é\n\\"} for i in range(20)]
    if name == "d.parquet":
        parquet(path, *good)
    else:
        path.write_text("\n".join(map(json.dumps, good)) if name == "d.jsonl" else json.dumps(good, indent=1))
    data, rng = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(150):
        at, n = rng.randrange(len(data)), rng.randrange(1, 30)
        damage = rng.choice([bytes(rng.randrange(256) for _ in range(n)), b"", data[at : at + n] * 2, b"{", b"]", b'"'])
        path.write_bytes(data[:at] + damage + data[at + n :])
        try:
            outcomes.add(bool(load_rows(path, skip_bad_rows=True).problems))
        except (CorruptError, UsageError) as error:
            assert "d." in str(error)
            outcomes.add("refused")
    assert len(outcomes) > 1


def test_limit_takes_the_first_rows(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(row(i)) for i in range(5)))
    assert [r["i"] for r in load_rows(Source(str(tmp_path / "d.jsonl"), limit=2)).rows] == [0, 1]
