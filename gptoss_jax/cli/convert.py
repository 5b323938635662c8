"""`gptoss-jax import`, `export`, `verify`: checkpoints in and out."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

# options of formats on the command line
FLAGS = {"scale_rule": "scale-rule", "element_round": "element-round", "seed": "round-seed", "per_expert": "granularity", "mxfp4_rule": "cast-mxfp4"}


def import_(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
) -> None:
    """Decodes a safetensors checkpoint into a training checkpoint (step 0 of an empty run directory).

    On several devices, or processes under a launcher, each holds, reads and writes its part.

    Args:
        source: HF directory (MXFP4 or BF16), OpenAI's original layout, or hub id.
        target: new directory.
        dtype: of the stored parameters; decoded MXFP4 is exact in both.
    """
    import jax.numpy as jnp

    from gptoss_jax.checkpoint import orbax_store
    from gptoss_jax.checkpoint.models import carried_files, load_model
    from gptoss_jax.checkpoint.staging import refuse_used
    from gptoss_jax.cli.byte_bar import byte_bar
    from gptoss_jax.cli.processes import all_processes
    from gptoss_jax.sharding import storage_shardings
    from gptoss_jax.sharding.distributed import is_first, on_first
    from gptoss_jax.training.run_dir import RunDir

    with all_processes("import"):
        # what a killed import left is removed by the save, under the lock that tells it from one that is still at work
        on_first(lambda: orbax_store.holds_only_leftovers(target) or refuse_used(target))
        with byte_bar("import") as tick:
            model = load_model(source, jnp.dtype(dtype), storage_shardings, tick=tick)
        meta = orbax_store.Meta(model=model.config.to_dict(), source=model.source)
        with RunDir(target, resume=True, overwrite=False):
            path = orbax_store.save(target / orbax_store.CHECKPOINTS, 0, model.params, meta, assets=carried_files(model.directory))
        if is_first():
            print(f"{path}: {sum(p.size for p in model.params.values()):,} parameters, {dtype}")


def export(
    source: Annotated[str, tyro.conf.Positional],
    target: Annotated[Path, tyro.conf.Positional],
    format: Literal["mxfp4", "nvfp4", "bf16", "peft"] | None = None,
    scale_rule: Literal["rceil", "floor", "even", "mse"] | None = None,
    element_round: Literal["rne", "away", "sr", "dither"] | None = None,
    round_seed: int | None = None,
    layout: Literal["hf", "openai", "own", "modelopt", "compressed-tensors"] | None = None,
    granularity: Literal["expert", "tensor"] | None = None,
    cast_mxfp4: bool = False,
    max_shard_gb: float = 5.0,
) -> int:
    """Writes a safetensors directory, verifies it, and only then gives it its name.

    The weights of a QAT checkpoint are encoded from its masters by the codec and scale rule that training used, and compared with the hashes
    that the compiled training program left in the checkpoint. Its BF16 export holds the values that the 4-bit codes decode to.
    On several devices, or processes under a launcher, each holds its part; the first process writes.

    Args:
        source: training checkpoint, HF directory, OpenAI's original layout, or hub id.
        target: new directory.
        format: number format of the expert weights; default: what the checkpoint was trained for. peft: only the adapters of a LoRA run, as PEFT
            loads them over the same base; every other format merges them.
        scale_rule: rule of MXFP4 block scales; default: the trained one, else rceil.
        element_round: how 4-bit elements are rounded: rne, to nearest, as training does (away: ties away from zero); sr, stochastically; dither,
            with noise spread evenly along rows. Anything but rne exports other weights than a QAT checkpoint was trained with.
        round_seed: seed of sr and dither, recorded in the export.
        layout: hf (default) or openai, OpenAI's original one, for mxfp4 and bf16; own (default), modelopt or compressed-tensors for nvfp4.
        granularity: NVFP4's global scale per expert, or one per tensor, as the layout modelopt needs it; default: as trained, else expert.
        cast_mxfp4: to nvfp4 without rounding anew: the MXFP4 codes (those trained, or of an MXFP4 checkpoint) with NVFP4's scales.
        max_shard_gb: largest file, in 10^9 bytes.
    """
    from gptoss_jax.cli.processes import all_processes
    from gptoss_jax.errors import UsageError

    if max_shard_gb <= 0:
        raise UsageError(f"--max-shard-gb must be positive, not {max_shard_gb}")
    with all_processes("export"):
        per_expert = None if granularity is None else granularity == "expert"
        options = dict(zip(FLAGS, (scale_rule, element_round, round_seed, per_expert, "rceil" if cast_mxfp4 else None)))
        given = {name: value for name, value in options.items() if value is not None}
        return _export(source, target, format, given, layout, int(max_shard_gb * 1e9))


def _export(source: str, target: Path, format: str | None, options: dict[str, Any], layout: str | None, max_shard_bytes: int) -> int:
    import jax.numpy as jnp

    from gptoss_jax.checkpoint import export_hf, verify_dir
    from gptoss_jax.checkpoint.models import export_format, load_adapters, load_model
    from gptoss_jax.checkpoint.peft_adapters import write_peft
    from gptoss_jax.checkpoint.staging import refuse_used
    from gptoss_jax.cli.byte_bar import byte_bar
    from gptoss_jax.errors import UsageError
    from gptoss_jax.formats import get_format
    from gptoss_jax.sharding import storage_shardings
    from gptoss_jax.sharding.distributed import is_first, on_first

    say = print if is_first() else lambda text: None
    on_first(lambda: refuse_used(target))
    if format == "peft":
        if options:
            raise UsageError(f"--{FLAGS[next(iter(options))]} is for 4-bit formats, not peft")
        on_first(lambda: write_peft(target, *load_adapters(source)))
        say(f"{target}: adapters for PEFT")
        return 0
    with byte_bar("read") as tick:
        model = load_model(source, jnp.bfloat16, storage_shardings, apart=True, tick=tick)
    trained = export_format(model) if model.policy else None
    if format is None and trained is None:
        raise UsageError(f"{source} was trained for no 4-bit format: say which with --format mxfp4, nvfp4 or bf16")
    if format == "bf16":
        fmt, bake = "bf16", trained
        if options:
            raise UsageError(f"--{FLAGS[next(iter(options))]} is for 4-bit formats, not bf16")
    else:
        fmt, bake = (trained if trained and format in (None, trained.name) else get_format(format)), None
        for name, owner in (("scale_rule", "mxfp4"), ("per_expert", "nvfp4"), ("mxfp4_rule", "nvfp4")):
            if name in options and fmt.name != owner:
                raise UsageError(f"--{FLAGS[name]} is for {owner}, not {fmt.name}")
        if "mxfp4_rule" in options and trained and trained.name == "mxfp4":
            options["mxfp4_rule"] = trained.scale_rule
        try:
            fmt = dataclasses.replace(fmt, **options)
        except ValueError as error:
            raise UsageError(f"--format {fmt.name}: {error}") from None
    with byte_bar("export") as tick:
        path = export_hf(
            target, model.config, model.params, format=fmt, bake=bake, source_dir=model.directory, max_shard_bytes=max_shard_bytes,
            provenance=model.source, layout=layout, tick=tick,
        )  # fmt: skip
    say(f"{path}: {fmt}, verified")
    if trained and fmt == trained:
        equal = on_first(lambda: verify_dir(path, against=model.code_hashes).ok)
        say(f"codes {'equal' if equal else 'DIFFER FROM'} those that training computed ({len(model.code_hashes)} expert matrices)")
        return 0 if equal else 1
    is_cast = "mxfp4_rule" in options and trained == get_format("mxfp4", scale_rule=options["mxfp4_rule"])
    if trained and fmt != "bf16" and not is_cast:
        say(f"note: {fmt} is not what this checkpoint was trained for ({trained}): the exported weights are not the trained ones")
    return 0


def verify(directory: Annotated[Path, tyro.conf.Positional], against: str | None = None) -> int:
    """Checks an exported directory: readable, what every client demands, hashes as written, and the weights of another model.

    Args:
        directory: HF directory to check.
        against: what it must hold: the training checkpoint that it came from (hashes of the trained codes), or any other model.
    """
    import jax.numpy as jnp

    from gptoss_jax.checkpoint import open_checkpoint, orbax_store, verify_dir
    from gptoss_jax.checkpoint.models import load_model

    if against is None:
        expected = [None]
    elif orbax_store.locate(against):
        model = load_model(against, jnp.bfloat16)
        # the masters say what every tensor must be; the hashes, what the compiled training program made of the experts
        holds_codes = open_checkpoint(directory).layout.experts != "bf16"
        expected = [model.params] + ([model.code_hashes] if model.code_hashes and holds_codes else [])
    else:
        expected = [open_checkpoint(against)]
    reports = [verify_dir(directory, against=other) for other in expected]
    print(next((report for report in reports if not report.ok), reports[0]))
    if len(reports) == 2 and reports[1].ok:
        print(f"  ok    codes equal those that training computed ({len(expected[1])} expert matrices)")
    return 0 if all(report.ok for report in reports) else 1
