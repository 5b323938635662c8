"""Training that arms share: each stage of an arm is named by a hash of all that it depends on, trained once, and kept on disk.

    base -> SFT                 kept for every experiment beside this one: ROOT/HASH.safetensors, what was recorded of it in ROOT/HASH.json
         -> further training    kept where several arms deploy the same weights in different ways

Two processes that need the same stage wait for each other (a lock on ROOT/HASH.lock, which the system frees with the process).
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from safetensors import safe_open
from safetensors.numpy import save_file

from gptoss_jax.checkpoint.models import Model, load_model
from gptoss_jax.data import Batch, BatchStream, encode_conversations, load_tokenizer, pack
from gptoss_jax.evaluation.tasks import sft_rows
from gptoss_jax.formats import Mxfp4
from gptoss_jax.lab import trainer
from gptoss_jax.lab.experiment import Arm, Experiment, fingerprint
from gptoss_jax.lab.held_out import HeldOut, deployed
from gptoss_jax.lab.noise import move_in_cell
from gptoss_jax.lab.parts import parse_export, quantizer_of, tools_of
from gptoss_jax.lab.quantizer import Quantizer, Unquantized
from gptoss_jax.training.config import DistillConfig, ScheduleConfig, TrainConfig, parse

Say = Callable[[str], None]
VERSION = 2  # of what is on disk; others are not read
NOTHING = {"history": {}, "curve": {}, "seconds": 0.0}


@dataclass(frozen=True)
class Stage:
    """Trained weights (float32), the quantizer's own arrays, and what was recorded on the way: `history`, a number per step by name; `curve`,
    (step, held-out loss as deployed) pairs by `label_of` the export."""

    params: dict[str, Array]
    extra: dict[str, Array]
    record: dict[str, Any]


def label_of(export: Any) -> str:
    """Of an export as an arm has it: its name in `curve`."""
    return export if isinstance(export, str) else json.dumps(export, sort_keys=True)


@contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file while the block runs; the block gets False, at once, where another process has it and `wait` is False."""
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


class Stages:
    """Stages of the arms of one experiment."""

    def __init__(self, experiment: Experiment, root: Path, say: Say = lambda text: None):
        self.experiment, self.root, self.say = experiment, root, say
        self._packed: dict[int, Batch] = {}
        root.mkdir(parents=True, exist_ok=True)

    @cached_property
    def model(self) -> Model:
        return load_model(self.experiment.model, jnp.float32)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.model.directory)

    @cached_property
    def held_out(self) -> HeldOut:
        return HeldOut(self.model, self.tokenizer, self.experiment.evaluation.set, self.experiment.evaluation.rows)

    # ---- names ----------------------------------------------------------------------------------------------------------------
    def sft_settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that the weights after SFT depend on."""
        shared = {"model": self.experiment.model, "data": self.experiment.data.model_dump(), "seed": seed, "base_noise": arm.base_noise}
        return {**shared, "sft": arm.sft.model_dump() if arm.start == "sft" else None}

    def settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """All that the weights before deployment depend on."""
        kept = arm.model_dump(mode="json", exclude={"start", "sft", "base_noise", "export"}) if arm.steps else None
        return {**self.sft_settings(arm, seed), "train": kept}

    # ---- weights --------------------------------------------------------------------------------------------------------------
    def base(self, arm: Arm, seed: int) -> dict[str, Array]:
        if not arm.base_noise:
            return self.model.params
        return move_in_cell(self.model.params, Mxfp4(), arm.base_noise, jax.random.key(seed))

    def sft(self, arm: Arm, seed: int) -> Stage:
        """The weights that the arm's further training starts from."""
        if arm.start == "base":
            return Stage(self.base(arm, seed), {}, NOTHING)
        train = self._train_config(arm.sft.steps, arm.sft.learning_rate, arm.sft.min_ratio, seed)
        return self._kept(self.sft_settings(arm, seed), lambda: self._train(train, Unquantized(), self.base(arm, seed), seed, ["bf16"]))

    def final(self, arm: Arm, seed: int, *, keep: bool, exports: Sequence[Any] = ("same",)) -> Stage:
        """The weights that the arm deploys; `keep` them for other arms, whose `exports` get a curve too."""
        start = self.sft(arm, seed)
        if not arm.steps:
            return Stage(start.params, quantizer_of(arm).init(start.params), NOTHING)
        train = self._train_config(arm.steps, arm.learning_rate, arm.min_ratio, seed)
        if arm.distill:
            train = train.model_copy(update={"distill": DistillConfig(teacher="sft", weight=arm.distill)})
        options = {"tools": tools_of(arm), "context": start.params if arm.distill else None}
        make = lambda: self._train(train, quantizer_of(arm), start.params, seed, exports, **options)
        return self._kept(self.settings(arm, seed), make) if keep else make()

    def _train_config(self, steps: int, learning_rate: float, min_ratio: float, seed: int) -> TrainConfig:
        optimizer, schedule = {"learning_rate": learning_rate, "b2": 0.95}, ScheduleConfig(min_ratio=min_ratio)
        train = parse({"steps": steps, "optimizer": optimizer, "compute_dtype": "float32", "remat": "products"})
        return train.model_copy(update={"seed": seed, "schedule": schedule})

    def _train(self, train: TrainConfig, quantizer: Quantizer, params, seed: int, exports: Sequence[Any], tools=(), context=None) -> Stage:
        start, every = time.monotonic(), self.experiment.evaluation.curve_every
        curve: dict[str, list[tuple[int, float]]] = {label_of(export): [] for export in exports}

        def watch(step, params, extra):
            if every and (step % every == 0 or step == train.steps):
                for export in exports:
                    made = deployed(self.model.config, params, extra, quantizer, parse_export(export))
                    curve[label_of(export)].append((step, self.held_out.loss(made)))

        loss = trainer.training_loss(self.model.config, train)
        batches = BatchStream(self._rows(seed), self.experiment.data.rows, seed, self.tokenizer)
        out = trainer.run(train, quantizer, params, batches, loss=loss, tools=tools, context=context, watch=watch)
        history = {name: [record[name] for record in out.history] for name in out.history[0]}
        return Stage(out.params, out.extra, {"history": history, "curve": curve, "seconds": time.monotonic() - start})

    def _rows(self, seed: int) -> Batch:
        """Packed training rows of the seed; those of the last seed stay in memory."""
        if seed not in self._packed:
            data = self.experiment.data
            self._packed = {seed: pack(encode_conversations(sft_rows(seed, data.documents), self.tokenizer), data.row_length).rows}
        return self._packed[seed]

    def _kept(self, settings: dict[str, Any], make: Callable[[], Stage]) -> Stage:
        """The stage with these settings from the disk, made if it is not there."""
        place = self.root / fingerprint({**settings, "version": VERSION})
        with locked(place.with_suffix(".lock")):
            if not place.with_suffix(".json").exists():
                stage = make()
                arrays = {**{f"params/{n}": x for n, x in stage.params.items()}, **{f"extra/{n}": x for n, x in stage.extra.items()}}
                save_file({name: jax.device_get(x) for name, x in arrays.items()}, place.with_suffix(".safetensors"))
                # the record last: where it is, the weights are whole
                temporary = place.with_suffix(".tmp")
                temporary.write_text(json.dumps({"settings": settings, **stage.record}))
                temporary.replace(place.with_suffix(".json"))
                return stage
        record = json.loads(place.with_suffix(".json").read_text())
        with safe_open(place.with_suffix(".safetensors"), "numpy") as file:
            arrays = {name: jnp.asarray(file.get_tensor(name)) for name in file.keys()}
        part = lambda kind: {name.removeprefix(f"{kind}/"): x for name, x in arrays.items() if name.startswith(f"{kind}/")}
        return Stage(part("params"), part("extra"), {name: record[name] for name in ("history", "curve", "seconds")})
