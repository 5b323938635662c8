"""No single mistake of the kinds people make with gpt-oss and MXFP4 goes unnoticed by the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mutants import MUTANTS

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_that_a_mutant_changes_is_there_once(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.before) == 1


@pytest.mark.slow
def test_every_mutant_is_noticed():
    done = subprocess.run([sys.executable, ROOT / "scripts/mutants.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
