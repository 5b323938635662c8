"""What a newcomer types first: init, recipes, --dry-run, --quiet, completion."""

import json
import re
import shutil
import subprocess

import pytest

from gptoss_jax.cli import COMMANDS, main
from gptoss_jax.cli.completion import found
from gptoss_jax.cli.recipes import shipped
from gptoss_jax.training.recipe.config import load_recipe
from gptoss_jax.training.yaml_config import load_config


def test_init_writes_configs_that_load_and_agree_with_each_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = ["--data", "my data: #1.jsonl", "--device", "h200", "--devices", "2", "--format", "nvfp4"]
    assert main(["init", "mine", *given]) == 0
    assert "estimated, not measured" in capsys.readouterr().out
    sft, qat, recipe = load_config("mine/sft.yaml"), load_config("mine/qat.yaml"), load_recipe("mine/recipe.yaml")
    assert sft.data.train == "my data: #1.jsonl" == qat.data.train and sft.data.eval_fraction == 0.1
    assert sft.mesh.size == 2 and qat.model == sft.output == "mine/runs/sft" and qat.quant.format == "nvfp4"
    assert recipe.stage("qat").optimizer == qat.optimizer and recipe.stage("sft").batch == sft.batch and "qat_nvfp4" in recipe.rows
    assert main(["init", "mine", *given]) == 2 and "exists already" in capsys.readouterr().err


def test_init_takes_compact_state_where_the_recipe_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "one", "--device", "h200", "--devices", "1"]) == 0
    train = load_config("one/sft.yaml")
    assert (train.master_dtype, train.optimizer.second_moment) == ("bfloat16", "factored") and train.batch.rows < 32
    assert train.optimizer.learning_rate == pytest.approx(2e-5 * (train.batch.rows / 32) ** 0.5, rel=0.05)
    assert load_recipe("one/recipe.yaml").stage("sft").master_dtype == "bfloat16"
    capsys.readouterr()
    assert main(["init", "none", "--device", "rtx4090", "--devices", "1"]) == 2
    assert "does not fit" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_recipes_are_listed_and_copied_with_what_they_name(tmp_path, capsys):
    assert main(["recipes", "ls"]) == 0
    listed = capsys.readouterr().out
    names = [path.relative_to(shipped()).with_suffix("").as_posix() for path in shipped().rglob("*.yaml")]
    assert all(re.search(rf"^{re.escape(name)} ", listed, re.MULTILINE) for name in names)
    assert main(["recipes", "cp", "falsereject_20b", str(tmp_path / "mine.yaml")]) == 0
    assert load_recipe(tmp_path / "mine.yaml") == load_recipe(shipped() / "falsereject_20b.yaml").model_copy(
        update={"tasks": load_recipe(tmp_path / "mine.yaml").tasks}
    )
    assert (tmp_path / "tasks" / "over_refusal.yaml").is_file() and (tmp_path / "multilingual_20b.yaml").is_file()
    for name, target, message in (
        ("falsereject_20b", "mine.yaml", "exists already"),
        ("sft_20", "x.yaml", "did you mean 'sft_20b'"),
        ("falsereject_20b", "sub/multilingual_20b.yaml", "choose another"),
    ):
        assert main(["recipes", "cp", name, str(tmp_path / target)]) == 2 and message in capsys.readouterr().err


def test_dry_run_reads_the_data_and_writes_nothing(tmp_path, capsys):
    data = tmp_path / "train.jsonl"
    chat = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]
    data.write_text(json.dumps({"messages": chat}) + "\n")
    given = ["model=nano", f"data.train={data}", "data.row_length=64", "batch.rows=1", f"output={tmp_path / 'run'}"]
    assert main(["sft", *given, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "would train 1 steps" in captured.out and "memory, estimated" in captured.err and "fits" in captured.err
    assert main(["qat", *given, "quant.format=mxfp4", "--dry-run", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "") and not (tmp_path / "run").exists()
    data.write_text('{"messages": [{"role": "asistant", "content": "4"}]}\n')
    assert main(["sft", *given, "--dry-run"]) == 4 and "train.jsonl:1" in capsys.readouterr().err


def test_completion_knows_every_command_and_flag_of_its_help(capsys):
    known = dict(found())
    assert {name.split()[0] for name in known} == set(COMMANDS)
    assert next(option for option in known["export"] if option.flag == "--element-round").values[0] == "rne"
    for command in ("report", "plan", "ckpt ls"):
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        shown = set(re.findall(r"(--[a-z][a-z-]+)", capsys.readouterr().out))
        assert {option.flag for option in known[command]} <= shown, command


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_and_choices(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)

    def complete(*words):
        typed = " ".join(f'"{word}"' for word in ("gptoss-jax", *words))
        command = f'. {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _gptoss_jax; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
        assert not done.stderr
        return done.stdout.split()

    (tmp_path / "my.yaml").write_text("")
    assert complete("rep") == ["report"] and complete("ckpt", "v") == ["verify"] and complete("sft", "--con") == ["--config"]
    assert complete("export", "--format", "nv") == ["nvfp4"] and complete("sft", "--config", "my") == ["my.yaml"]
    assert complete("ckpt", "ls", "--j") == ["--json"]
