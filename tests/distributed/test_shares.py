"""Two processes: each reads its share of a checkpoint and tokenizes its share of the rows; together they have what one process has."""

import json
import re

import jax
import pytest

from gptoss_jax.checkpoint import export_hf, open_checkpoint, verify_dir
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import Pipeline, Source, load_tokenizer, rows_hash, training_and_held_out
from gptoss_jax.data import together as together_module
from gptoss_jax.model import init_params
from tests.distributed.support import MODEL, Processes

CODE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from gptoss_jax import initialize, load_params, open_checkpoint
from gptoss_jax.checkpoint.safetensors_io import SafetensorsFile
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import Pipeline, Source, load_tokenizer, rows_hash, training_and_held_out
from gptoss_jax.data import pipeline as pipeline_module
from gptoss_jax.errors import GptOssError
from gptoss_jax.sharding import make_mesh, param_shardings
from gptoss_jax.sharding.distributed import gather, on_each
root, model = sys.argv[1:]
me = initialize().process_id
said = {"process": me}
original, said["bytes"] = SafetensorsFile.read, {}
def read(file, name, ranges):
    found = original(file, name, ranges)
    said["bytes"][name] = said["bytes"].get(name, 0) + found.nbytes
    return found
SafetensorsFile.read = read
source = open_checkpoint(model)
_, params = load_params(source, jnp.float32, param_shardings(source.config, make_mesh(expert=2)))
said["sums"] = {name: float(jnp.abs(p).sum()) for name, p in params.items()}

counts = [3, 0] if me else [17_000_000, 5]
said["gathered"] = [[len(x), x.dtype.name, int(x.sum())] for x in (gather(np.full(n, me + 1, np.uint8)) for n in counts)]
said["each"] = on_each(lambda: {"process": me})

def rows(*files):
    training, _ = training_and_held_out(pipeline.tokenize([Source(f"{root}/{file}.jsonl") for file in files], together=True), None, None, 0)
    return training.corpus.counts, rows_hash(pipeline.pack("rows", training).rows)
pipeline = Pipeline(load_tokenizer(NANO), 64)
done, encode = [], pipeline_module._encode
pipeline_module._encode = lambda how, examples: done.append(len(examples)) or encode(how, examples)
counts, said["rows"] = rows("a", "b")
said["tokenized"], said["layouts"] = sum(done), [dict(count.layouts) for count in counts]
said["errors"] = []
for files in (["bad"], ["nowhere"], [f"own{me}"], [f"only{me}"]):
    try:
        rows(*files)
    except GptOssError as error:
        said["errors"].append([type(error).__name__, str(error), error.everywhere])
sys.stdout.write("SAID " + json.dumps(said) + "\\n")
"""


def conversation(i):
    return {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "word " * (i % 7 + 1) + str(i)}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("shares")
    write(path / "a.jsonl", map(conversation, range(300)))
    write(path / "b.jsonl", map(conversation, range(50)))
    bad = [*map(conversation, range(100))]
    for i in (10, 70):  # one in the share of each process
        bad[i] = {"messages": []}
    write(path / "bad.jsonl", bad)
    for name in ("own0", "own1", "only0"):
        write(path / f"{name}.jsonl", map(conversation, range(3, 9) if name == "own1" else range(6)))
    (path / "only1.jsonl").mkdir()
    export_hf(path / "model", MODEL, init_params(MODEL, jax.random.key(3)), format="mxfp4")
    return path


@pytest.fixture(scope="module")
def said(root):
    with Processes(2, ["-c", CODE, str(root), str(root / "model")]) as run:
        assert run.end() == 0, run.text
    return [value for _, value in sorted((s["process"], s) for s in map(json.loads, re.findall(r"SAID (.*)", run.text)))]


def test_each_process_reads_its_experts_and_what_every_device_holds(root, said):
    infos = open_checkpoint(root / "model").store.infos
    for one in said:
        assert one["bytes"].keys() == infos.keys()
        halves = {key for key, size in one["bytes"].items() if size * 2 == infos[key].nbytes}
        assert {key for key in infos if "experts" in key} <= halves
    for key, info in infos.items():
        assert sum(one["bytes"][key] for one in said) in (info.nbytes, 2 * info.nbytes), key
    assert sum(one["bytes"][key] for one in said for key in infos) < 1.1 * sum(info.nbytes for info in infos.values())
    assert said[0]["sums"] == said[1]["sums"]


def test_arrays_of_any_length_are_gathered(said):
    assert [one["gathered"] for one in said] == [[[17_000_003, "uint8", 17_000_006], [5, "uint8", 5]]] * 2
    assert [one["each"] for one in said] == [[{"process": 0}, {"process": 1}]] * 2


def test_rows_are_those_of_a_single_process_and_each_made_half(root, said):
    pipeline = Pipeline(load_tokenizer(NANO), 64)
    training, _ = training_and_held_out(pipeline.tokenize([Source(str(root / "a.jsonl")), Source(str(root / "b.jsonl"))]), None, None, 0)
    assert {one["rows"] for one in said} == {rows_hash(pipeline.pack("rows", training).rows)}
    # of 300 rows blocks 0, 2, 4 and the block of the other source; blocks 1, 3
    assert [one["tokenized"] for one in said] == [3 * 64 - 20 + 50, 2 * 64] and together_module.BLOCK_ROWS == 64
    assert [one["layouts"] for one in said] == [[{"messages": 300}, {"messages": 50}]] * 2


def test_import_and_export_commands_of_two_processes(root):
    """Every parameter is cut over both; what comes back has every value."""
    with Processes(2, ["-m", "gptoss_jax", "import", str(root / "model"), str(root / "run")]) as run:
        assert run.end() == 0, run.text
    assert run.text.count("parameters, bfloat16") == 1
    with Processes(2, ["-m", "gptoss_jax", "export", str(root / "run"), str(root / "again"), "--format", "mxfp4"]) as run:
        assert run.end() == 0, run.text
    assert run.text.count(", verified") == 1
    report = verify_dir(root / "again", against=root / "model")
    assert report.ok, report


def test_bad_rows_and_unequal_files_are_refused_by_all(said):
    # the files of the two have different names; the process that fails does not name itself
    same_path = [json.loads(re.sub(r"process 1: |(?<=own)[01]|(?<=only)[01]", "", json.dumps(one["errors"]))) for one in said]
    assert same_path[0] == same_path[1]
    bad, nowhere, other, only = said[0]["errors"]
    assert bad[0] == "CorruptError" and bad[1].startswith("2 of 100 rows") and re.search(r"bad\.jsonl:11: .*\n.*bad\.jsonl:71: ", bad[1])
    assert nowhere[0] == "UsageError" and "nowhere.jsonl" in nowhere[1] and nowhere[2]
    assert other[0] == "UsageError" and "differ between processes: 1 do not have those of process 0" in other[1] and other[2]
    assert only[0] == "UsageError" and "only1.jsonl is no directory" in only[1] and only[2]
