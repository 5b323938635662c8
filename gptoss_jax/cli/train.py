"""`gptoss-jax sft` and `qat`: one implementation, told apart by `quant` in the config."""

from pathlib import Path
from typing import Annotated

import tyro


def sft(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    config: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    print_config: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Fine-tunes in BF16 on float32 masters (or what the config says).

    Args:
        overrides: settings over those of the file, as optimizer.learning_rate=1e-5; see configs/.
        config: YAML file; without it the defaults, which are the recipe's.
        resume: go on from the newest good checkpoint in the output directory.
        overwrite: remove an earlier run in the output directory.
        print_config: print the resolved config and stop.
        dry_run: read the data, check everything but the weights, estimate memory, and stop; nothing is written.
        quiet: print errors alone; the run directory has the rest.
    """
    _run(config, overrides, resume, overwrite, print_config, dry_run, quiet, quantized=False)


def qat(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    config: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    print_config: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
) -> None:
    """Trains through fake quantization of the experts, from the weights of an SFT run, with a fresh optimizer.

    Args:
        overrides: settings over those of the file, as model=runs/sft quant.scale_rule=even; see configs/.
        config: YAML file; it must set `quant`.
        resume: go on from the newest good checkpoint in the output directory.
        overwrite: remove an earlier run in the output directory.
        print_config: print the resolved config and stop.
        dry_run: read the data, check everything but the weights, estimate memory, and stop; nothing is written.
        quiet: print errors alone; the run directory has the rest.
    """
    _run(config, overrides, resume, overwrite, print_config, dry_run, quiet, quantized=True)


def _run(
    path: Path | None, overrides: tuple[str, ...], resume: bool, overwrite: bool, print_config: bool, dry_run: bool, quiet: bool, quantized: bool
) -> None:
    from gptoss_jax.errors import UsageError
    from gptoss_jax.training.yaml_config import dump_config, load_config

    train = load_config(path, overrides)
    if quantized and train.quant is None:
        raise UsageError("the config has no `quant`: give quant.format=mxfp4 or nvfp4, or use `gptoss-jax sft`")
    if not quantized and train.quant is not None:
        raise UsageError(f"the config quantizes to {train.quant.format}: use `gptoss-jax qat`, or quant=null")
    if print_config:
        print(dump_config(train), end="")
        return

    from rich.console import Console

    from gptoss_jax.cli.processes import all_processes
    from gptoss_jax.sharding.distributed import is_first
    from gptoss_jax.training import stage
    from gptoss_jax.training.console import Progress

    with all_processes("qat" if quantized else "sft"):
        progress = Progress(console=Console(quiet=True) if quiet or not is_first() else None)
        if dry_run:
            train = stage.dry_run(train, progress)
            told = f"{train.output}: would train {train.steps} steps; nothing was written"
        else:
            directory, state = stage.run_stage(train, resume=resume, overwrite=overwrite, progress=progress)
            after = f"gptoss-jax export {directory} OUT" if quantized else f"gptoss-jax qat --config ... model={directory} quant.format=mxfp4"
            told = f"{directory}: {int(state.step)} steps done\nnext: {after}"
        if is_first() and not quiet:
            print(told)
