"""The GPU suite runs on tiny shapes everywhere, so that it works the day a GPU is at hand; and each part is lost alone."""

import json

import pytest

from scripts.bench import gpu_suite

# what compiles long, or shares its code with a part that runs anyway
SLOW = ("step_sft", "repeatable", "layers", "transformers_layers")


@pytest.mark.parametrize("part", [pytest.param(part, marks=[pytest.mark.slow] if part in SLOW else []) for part in gpu_suite.LIMITS])
def test_part_runs_on_tiny_shapes(part):
    result = gpu_suite.run_part(part, smoke=True)
    assert result.get("ok", True), result
    assert '"error":' not in json.dumps(result), result


def test_a_part_that_fails_or_hangs_is_reported_and_the_next_one_runs(monkeypatch, tmp_path, capsys):
    script = tmp_path / "parts.py"
    script.write_text(
        "import sys, time\n"
        "name = sys.argv[sys.argv.index('--part') + 1]\n"
        "if name == 'codec': raise MemoryError('no room')\n"
        "if name == 'kernels': time.sleep(60)\n"
        "print('RESULT {\"ok\": true}')\n"
    )
    monkeypatch.setattr(gpu_suite, "__file__", str(script))
    monkeypatch.setitem(gpu_suite.LIMITS, "kernels", 1)
    crashed, hung, fine = (gpu_suite.spawn(name, True, gpu_suite.LIMITS[name]) for name in ("codec", "kernels", "layers"))
    assert "no room" in crashed["error"] and "stopped after 1 s" in hung["error"] and fine["ok"]
