"""llama.cpp's own convert_hf_to_gguf.py, from the source package of llama-cpp-python 0.3.36, which is fetched once into the temporary directory."""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

PACKAGE = "llama-cpp-python==0.3.36"
GIVEN = "GPTOSS_JAX_LLAMA_CPP"  # a directory with convert_hf_to_gguf.py, instead of the package
NEEDED = ("convert_hf_to_gguf.py", "conversion/", "gguf-py/")

# The converter knows tokenizers by a hash of what they make of a test string. That of the small model is taken for the release's, which it is like
# but for its merges; nothing else is replaced.
SCRIPT = """
import runpy, sys
tool, source, target = sys.argv[1:4]
sys.path[:0] = [tool, tool + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-4o"
sys.argv = ["convert_hf_to_gguf.py", source, "--outfile", target, "--outtype", "f32"]
runpy.run_path(tool + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def converter() -> Path:
    """The directory of the converter; skips the test, with the reason, where it cannot be had."""
    if GIVEN in os.environ:
        return Path(os.environ[GIVEN])
    place = Path(tempfile.gettempdir()) / "gptoss_jax_llama_cpp"
    tool = place / "llama.cpp"
    if not (tool / NEEDED[0]).is_file():
        command = [sys.executable, "-m", "pip", "download", "-q", PACKAGE, "--no-binary", "llama-cpp-python", "--no-deps", "-d", str(place)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except subprocess.TimeoutExpired:
            pytest.skip(f"`pip download {PACKAGE}` (77 MB) took longer than 600 s")
        archives = sorted(place.glob("llama_cpp_python-*.tar.gz"))
        if not archives:
            reason = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            pytest.skip(f"llama.cpp's converter comes with {PACKAGE}, which cannot be downloaded: {reason}; or set {GIVEN} to its directory")
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                _, found, name = member.name.partition("/vendor/llama.cpp/")
                if found and name.startswith(NEEDED):
                    member.name = name
                    archive.extract(member, tool, filter="data")
    return tool


def convert(source: Path, target: Path) -> str:
    """Converts a directory to a GGUF file; returns what the converter logged."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(converter()), str(source), str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr
