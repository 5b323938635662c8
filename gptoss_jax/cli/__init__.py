"""The command line. Commands live in modules of this folder and are imported when they run, so help needs neither jax nor a second."""

import difflib
import importlib
import os
import sys

import gptoss_jax
from gptoss_jax.cli.host_memory import restart_with_huge_pages

# command -> (module, function, one line of help, example)
COMMANDS = {
    "demo": ("recipe", "demo", "the whole recipe on the small model that comes along: SFT, QAT, export, verify, pass rates", "demo"),
    "recipe": ("recipe", "recipe", "the recipe of one YAML file, over several seeds, with all comparison rows", "recipe configs/nano_recipe.yaml"),
    "diagnose": ("diagnose", "diagnose", "does a fine-tuned model need QAT, or is rounding it enough?", "diagnose runs/sft"),
    "sft": ("train", "sft", "supervised fine-tuning in BF16", "sft --config configs/sft_20b.yaml optimizer.learning_rate=1e-5"),
    "qat": ("train", "qat", "quantization-aware training: the same through fake quantization", "qat --config configs/qat_mxfp4_20b.yaml"),
    "init": ("init", "init", "starting configs (sft, qat, recipe) for your model, data and hardware", "init mine --data train.jsonl --device h100"),
    "recipes": ("recipes", "COMMANDS", "the configs that come along: list, copy", "recipes cp sft_20b mine.yaml"),
    "import": ("convert", "import_", "safetensors checkpoint -> training checkpoint (Orbax)", "import openai/gpt-oss-20b runs/base"),
    "export": ("convert", "export", "checkpoint -> safetensors directory for inference", "export runs/qat out/ --format mxfp4"),
    "verify": ("convert", "verify", "check an exported directory: structure, hashes, weights", "verify out/ --against runs/qat"),
    "logits": ("logits", "logits", "logits of token ids, for comparisons", "logits out/ --tokens t.npy --out l.npy --dtype float32"),
    "eval": ("evaluate", "evaluate", "pass rates and loss of any checkpoint or served model", "eval out/ --task A B my_task.yaml"),
    "compare": ("compare", "compare", "how far two models are apart; is a served model the trained one", "compare out/ --endpoint http://localhost:8000"),
    "generate": ("generate", "generate", "answers to prompts, thoughts apart", 'generate out/ --prompt "How many moons has Mars?"'),
    "chat": ("chat", "chat", "a conversation on the terminal", "chat out/"),
    "report": ("report", "report", "a page of curves, tables and samples of a run, or of several side by side", "report runs/sft runs/qat"),
    "ckpt": ("ckpt", "COMMANDS", "the training checkpoints of a run: list, show, verify", "ckpt ls runs/qat"),
    "data": ("data", "COMMANDS", "what a data set turns into (inspect), what is wrong with it (validate)", "data inspect train.jsonl"),
    "lab": ("lab", "COMMANDS", "research on quantization gradients: probe a model, run experiments", "lab run e1_recipe"),
    "plan": ("plan", "plan", "memory, traffic, layout of a training config before anything is allocated", "plan --config FILE.yaml --device h200"),
    "completion": ("completion", "completion", "a script by which a shell completes commands and options", "completion bash"),
    "env": ("env", "env", "versions, devices and what is missing; --xla-flags: settings for GPUs", "env --xla-flags --device h200"),
}  # fmt: skip
# run long enough to gain from memory in large pages
COMPUTING = ("demo", "recipe", "diagnose", "sft", "qat", "eval", "compare", "generate", "chat", "import", "export", "logits", "lab")


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"gptoss-jax {gptoss_jax.__version__}: {gptoss_jax.__doc__.splitlines()[0]}", "", "commands:"]
    lines += [f"  {name:<{width}}  {entry[2]}" for name, entry in COMMANDS.items()]
    lines += ["", "examples:"]
    lines += [f"  gptoss-jax {COMMANDS[name][3]}" for name in ("demo", "sft", "qat", "export", "verify")]
    lines += ["", "gptoss-jax COMMAND --help tells more. Exit codes: 0 done, 1 failed, 2 usage, 3 numerics, 4 corrupt data, 130/143 signals."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    from_shell = argv is None
    argv = sys.argv[1:] if from_shell else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(gptoss_jax.__version__)
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; commands are {', '.join(COMMANDS)}"
        print(f"gptoss-jax: unknown command {argv[0]!r}{hint}", file=sys.stderr)
        return 2

    if from_shell and argv[0] in COMPUTING and "--help" not in argv:
        restart_with_huge_pages(argv)

    from gptoss_jax.errors import GptOssError
    from gptoss_jax.secrets import redacted

    module, function, _, _ = COMMANDS[argv[0]]
    try:
        run = getattr(importlib.import_module(f"gptoss_jax.cli.{module}"), function)
        if argv == ["env"]:
            return run()  # works without any package
        import tyro

        parse = tyro.cli
        if isinstance(run, dict):  # a command of two words
            parse = tyro.extras.subcommand_cli_from_dict
            if len(argv) == 1:
                print("\n".join(f"gptoss-jax {argv[0]} {name:<10} {command.__doc__.splitlines()[0]}" for name, command in run.items()))
                return 0
        return parse(run, prog=f"gptoss-jax {argv[0]}", args=argv[1:], config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)) or 0
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gptoss_jax"):
            raise
        print(f"gptoss-jax {argv[0]}: the package {error.name!r} is not installed; `gptoss-jax env` lists what is missing", file=sys.stderr)
        return 1
    except GptOssError as error:
        print(redacted(f"gptoss-jax {argv[0]}: {error}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of a pipe left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
