"""A model directory may carry any chat template and name any code: neither is run here. Conversations are rendered by this library's own text."""

import ast
import json
import shutil
import time
from pathlib import Path

import pytest

import gptoss_jax
from gptoss_jax.checkpoint import hf_config
from gptoss_jax.checkpoint.source import NANO
from gptoss_jax.data import load_tokenizer
from gptoss_jax.data.harmony import HarmonyEncoder, render
from gptoss_jax.errors import CorruptError

# rendered, the first would take years, the second 300 MB, the third a shell
HOSTILE = {
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}",
    "memory": "{{ 'a' * 300000000 }}",
    "code": "{{ cycler.__init__.__globals__.os.system('touch RUN') }}",
}
MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture
def directory(tmp_path):
    return Path(shutil.copytree(NANO, tmp_path / "model"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_are_carried_and_not_rendered(kind, directory, monkeypatch):
    monkeypatch.chdir(directory)
    expected = HarmonyEncoder(load_tokenizer(NANO)).encode([render(MESSAGES)])[0].ids
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": HOSTILE[kind]}))
    (directory / "chat_template.jinja").write_text(HOSTILE[kind])
    start = time.process_time()
    ids = HarmonyEncoder(load_tokenizer(directory)).encode([render(MESSAGES)])[0].ids
    files, _ = hf_config.read_companions(directory)
    assert ids.tolist() == expected.tolist() and files["chat_template.jinja"].decode() == HOSTILE[kind]
    assert time.process_time() - start < 10 and not (directory / "RUN").exists()


def test_code_that_a_directory_names_is_not_run(directory, monkeypatch):
    monkeypatch.chdir(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, **named}))
    (directory / "evil.py").write_text("from pathlib import Path\nPath('RUN').touch()\n")
    load_tokenizer(directory)
    assert not (directory / "RUN").exists()


def test_files_of_absurd_size_are_refused_before_they_are_read(directory):
    for name, size in (("chat_template.jinja", hf_config.MAX_TEMPLATE_BYTES + 1), ("tokenizer.json", 10 << 30)):
        kept = (directory / name).read_bytes()
        with (directory / name).open("r+b") as file:
            file.truncate(size)  # sparse: takes no room on the disk
        for read in (load_tokenizer, hf_config.read_companions):
            with pytest.raises(CorruptError, match=f"{name}: has {size:,} bytes, more than"):
                read(directory)
        (directory / name).write_bytes(kept)
    load_tokenizer(directory)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"model": 1}', "\0" * 100])
def test_a_broken_tokenizer_gets_one_line(text, directory):
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(CorruptError, match="its files make no tokenizer") as error:
        load_tokenizer(directory)
    assert "\n" not in str(error.value)


def test_the_package_renders_no_template_and_unpickles_nothing():
    """Neither Jinja nor pickle is imported, no call asks for remote code."""
    for path in sorted(Path(gptoss_jax.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"jinja2", "pickle", "cloudpickle", "dill", "marshal"}, path
            elif isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Attribute) and node.func.attr == "apply_chat_template"), path
                assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")), path
                asked = [k.value for k in node.keywords if k.arg in ("trust_remote_code", "allow_pickle")]
                assert all(isinstance(value, ast.Constant) and value.value is False for value in asked), path
