"""`gptoss-jax lab run` and `lab plot`: experiments on quantization gradients."""

from pathlib import Path
from typing import Annotated

import tyro


def run(
    experiment: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    out: Path | None = None,
    processes: int = 1,
    limit: int | None = None,
) -> None:
    """Runs the arms of an experiment that have no result yet, then writes its plots and report.

    Args:
        experiment: YAML file, or the name of one that comes along, as e3_estimators.
        overrides: settings over those of the file, as evaluation.set=dev seeds=[0].
        out: directory of the results; default runs/lab/NAME. Experiments with a common parent share their SFT stages.
        processes: that work at the same time, each on its share of the cores.
        limit: run only the first so many arms and seeds.
    """
    from gptoss_jax.cli.lab_processes import is_worker, run_all, take_share_of_cores

    take_share_of_cores()  # before JAX counts them
    from gptoss_jax.lab.experiment import load_experiment

    experiment = _file(experiment)
    found, arms = load_experiment(experiment, overrides)
    out = out or Path("runs/lab") / found.name
    run_all(experiment, overrides, found, arms, out, processes, limit)
    if not is_worker():
        _report(found, arms, out)


def plot(
    target: Annotated[Path, tyro.conf.Positional],
    more: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    out: Path | None = None,
) -> None:
    """Makes the plots and the report of an experiment again from its results; or the plots of probes.

    Args:
        target: YAML file or name of an experiment, or a directory that `lab probe --out` filled.
        more: the overrides that the experiment was run with; or further directories, to be shown beside the first.
        out: directory of the results, default runs/lab/NAME; of probes, where the plots go, default DIR/plots.
    """
    if target.is_dir():
        from gptoss_jax.lab.probe_plots import of_probes

        for title, file in of_probes([target, *map(Path, more)], out or target / "plots"):
            print(f"{title}: {file}")
        return
    from gptoss_jax.lab.experiment import load_experiment

    found, arms = load_experiment(_file(target), more)
    _report(found, arms, out or Path("runs/lab") / found.name)


def _file(experiment: Path) -> Path:
    """The file itself, or the one of that name in the package's configs/lab."""
    import gptoss_jax

    package = Path(gptoss_jax.__file__).parent
    shipped = (folder / "lab" / f"{experiment}.yaml" for folder in (package / "configs", package.parent / "configs"))
    return experiment if experiment.suffix or experiment.exists() else next((file for file in shipped if file.is_file()), experiment)


def _report(experiment, arms, out: Path) -> None:
    from gptoss_jax.lab.report import write_report

    for line in write_report(experiment, arms, out):
        print(line)

