"""The loop: batches through the compiled step, metrics, evaluation, checkpoints, resume, signals. The same for SFT and QAT.

Each step is dispatched before the metrics of the one before are read, so the device does not wait for the host. A checkpoint holds everything that
the next step depends on (masters, moments, counters, data position), so an interrupted and resumed run equals an unbroken one bit for bit. A QAT
checkpoint also holds the hashes of the codes that the forward pass of training computes on the saved state.

Many processes run this loop in step. Each makes its own rows of a batch; the first alone writes and prints; a signal to any of them stops all after
the same step.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gptoss_jax.checkpoint import orbax_store
from gptoss_jax.checkpoint.hashes import code_hashes
from gptoss_jax.errors import CorruptError, NumericsError, RunError, UsageError
from gptoss_jax.model import GptOssConfig
from gptoss_jax.quant import QuantPolicy, make_expert_quant
from gptoss_jax.sharding import place_rows
from gptoss_jax.sharding.distributed import AgreedMaximum, on_first
from gptoss_jax.training.config import TrainConfig, flat
from gptoss_jax.training.console import Progress
from gptoss_jax.training.router import router_numbers, router_table
from gptoss_jax.training.run_dir import METRICS, RunDir, read_metrics
from gptoss_jax.training.signals import Interrupted, StopRequest
from gptoss_jax.training.spikes import SpikeWatch
from gptoss_jax.training.step import (
    Params,
    Shardings,
    Teacher,
    TrainState,
    abstract_state,
    init_state,
    make_capture_step,
    make_eval_step,
    make_train_step,
    model_params,
    saved_params,
)

MAX_SKIPPED_IN_ROW = 3
# settings that may change between a run and its continuation: they do not touch the result
FREE_ON_RESUME = (
    "model", "output", "data.train", "data.eval", "eval_every", "eval_tasks", "checkpoint_every", "keep", "mesh.", "expert_transport",
    "batch.accumulation", "spike_sigmas",
)  # fmt: skip


class BatchIterator(Protocol):
    """Endless batches of `train.batch.rows` rows, or of this process's part of them (`gptoss_jax.data.BatchStream`). `state()` is the position of
    the next batch, as plain JSON; `restore` refuses other data."""

    def __next__(self) -> Any: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Trainer:
    """One stage of training in one run directory.

    Args:
      train: with its length in steps known.
      policy: what is fake-quantized; None for SFT.
      eval_batches: makes a fresh pass over the evaluation set; evaluated before the first step, every `train.eval_every` and at the end.
      measure: (step, parameters) -> further numbers of an evaluation, by the name they get in metrics.jsonl (`task_rates.TaskRates`).
      teacher: the model of `train.distill`.
      assets: files that travel with the checkpoints (tokenizer, source config.json).
    """

    def __init__(
        self,
        config: GptOssConfig,
        train: TrainConfig,
        run: RunDir,
        batches: BatchIterator,
        *,
        policy: QuantPolicy | None = None,
        eval_batches: Callable[[], Iterable[Any]] | None = None,
        measure: Callable[[int, Params], dict[str, float]] | None = None,
        shardings: Shardings | None = None,
        teacher: Teacher | None = None,
        assets: Iterable[Path] = (),
        progress: Progress | None = None,
    ):
        expert_quant = make_expert_quant(policy, jnp.dtype(train.compute_dtype))
        self.config, self.train, self.run, self.batches, self.policy = config, train, run, batches, policy
        self.measure, self.spike = measure, SpikeWatch(train.spike_sigmas)
        self.eval_batches, self.shardings, self.assets = eval_batches, shardings, tuple(assets)
        self.progress = progress or Progress(train.steps)
        self.train_step = make_train_step(config, train, expert_quant, shardings, teacher)
        self.teacher = () if teacher is None else (teacher.params,)
        self.eval_step = make_eval_step(config, train, expert_quant, shardings)
        self.capture_step = make_capture_step(config, train, expert_quant, shardings, weights=False) if policy else None
        self.all_finite = jax.jit(lambda params: jnp.all(jnp.stack([jnp.isfinite(p).all() for p in params.values()])))
        self.state: TrainState | None = None
        self.source: Mapping[str, Any] | None = None
        self.step = 0  # finished steps
        self._clock: float | None = None
        self._device = SingleDeviceSharding(jax.local_devices()[0])  # where all lies without a mesh

    # ---- begin ----------------------------------------------------------------------------------------------------------------
    def start(self, params: Params, *, source: Mapping[str, Any] | None = None, donate: bool = False) -> None:
        """Begins with given parameters and a fresh optimizer. `source` says where they came from, for the record; see `init_state` for `donate`."""
        self.source = source
        state = init_state(self.config, self.train, params, self.shardings, donate=donate)
        # as a restored state: arrays without a fixed device would compile to another program than arrays with one
        self.state = state if self.shardings else jax.device_put(state, self._device)

    def resume(self, base: Params | None = None, source: Mapping[str, Any] | None = None) -> int | None:
        """Continues from the newest checkpoint of this run that is whole; a damaged one is set aside with a warning.

        Returns its step, or None where there is no checkpoint.

        Args:
          base, source: of a run that trains adapters: the frozen parameters, which the checkpoint does not hold, and the record that `start` had.

        Raises:
          UsageError: the run was made with other settings, another model or other data.
          CorruptError: all checkpoints are damaged.
        """
        step = self._newest_good_step()
        if step is not None:
            self._restore(step, base or {}, source)
        on_first(lambda: self.run.rewind_metrics(-1 if step is None else step))
        if self.train.spike_sigmas is not None and (self.run.path / METRICS).exists():
            self.spike.restore(line.get("loss") for line in read_metrics(self.run.path))
        return step

    def _newest_good_step(self) -> int | None:
        steps = on_first(lambda: orbax_store.list_steps(self.run.checkpoints))
        while steps:
            try:
                orbax_store.verify(self.run.checkpoints, steps[-1])
                return steps[-1]
            except CorruptError as error:
                if len(steps) == 1:
                    raise
                damaged = steps.pop()
                moved = on_first(lambda damaged=damaged: orbax_store.quarantine(self.run.checkpoints, damaged).name)
                self.progress.note(f"WARNING: {error}; moved to {moved}, going on with the step before")
        return None

    def _restore(self, step: int, base: Params, source: Mapping[str, Any] | None) -> None:
        directory = self.run.checkpoints
        meta = orbax_store.read_meta(directory, step)
        _check_same_run(meta, self.config, self.train, f"{directory / str(step)}")
        if self.train.lora and meta.source["lora"]["base"]["xxh3_128"] != source["lora"]["base"]["xxh3_128"]:
            raise UsageError(f"{directory / str(step)}: holds adapters of another model than {source['lora']['base']['model']}")
        target = abstract_state(self.config, self.train, self.shardings)
        params, (opt_state, skipped, in_row) = orbax_store.restore(
            directory, step, saved_params(self.train, target.params), (target.opt_state, target.skipped, target.skipped_in_row), verified=True
        )
        counter = jax.device_put(np.int32(step), target.step.sharding or self._device)
        self.state = TrainState(counter, {**jax.device_put(dict(base), self._device), **params}, opt_state, skipped, in_row)
        self.batches.restore(meta.data_state)
        self.source = meta.source
        self.step = step

    # ---- run ------------------------------------------------------------------------------------------------------------------
    def fit(self) -> TrainState:
        """Trains to the last step, saves, and returns the state.

        Raises:
          NumericsError: loss or gradients not finite in 3 steps in a row; the last checkpoint stays as it is.
          Interrupted: SIGTERM or SIGINT came; the state is saved. With several processes they agree on it, after at most two more steps.
        """
        pending = placed = None
        saved, agreed, signum = self.step, AgreedMaximum(), 0
        with StopRequest() as stop, self.progress:
            if self.step == 0:
                self._evaluate_into({"step": 0})
            while self.step < self.train.steps and not (signum := agreed(stop.signum or 0)):
                position = self.batches.state()
                batch, placed = self._next_batch()
                with jax.transfer_guard("disallow"):
                    self.state, metrics = self.train_step(self.state, placed, *self.teacher)
                self.step += 1
                if pending is not None:
                    self._report(*pending)
                pending = (self.step, metrics, position, batch)
                evaluate, save = self._is_due(self.train.eval_every), self._is_due(self.train.checkpoint_every)
                if evaluate or save:
                    self._report(*pending, evaluate=evaluate)
                    pending = None
                if save:
                    self._save(placed)
                    saved = self.step
            if pending is not None:
                self._report(*pending, evaluate=self.step == self.train.steps)
            if self.step > saved:
                self._save(placed)
        if signum and self.step < self.train.steps:
            kept = f"step {self.step} is saved in {self.run.checkpoints}" if self.step else "before the first step"
            raise Interrupted(f"stopped by signal {signum}: {kept}; go on with --resume", signum)
        return self.state

    def _is_due(self, every: int | None) -> bool:
        """Within the run; its end evaluates and saves in any case."""
        return every is not None and self.step % every == 0 and self.step < self.train.steps

    def _place(self, batch: Any) -> Any:
        """On the devices, from the whole batch or from this process's rows of it."""
        return place_rows(batch, self.train.batch.rows, self.shardings.batch) if self.shardings else jax.device_put(batch, self._device)

    def _next_batch(self) -> tuple[Any, Any]:
        """The next batch as it came, and on the devices."""
        try:
            batch = next(self.batches)
        except StopIteration:
            raise RunError(f"the data ended after step {self.step} of {self.train.steps}") from None
        return batch, self._place(batch)

    def evaluate(self) -> float | None:
        """Mean loss over the evaluation set under the numerics of training, None without one."""
        if self.eval_batches is None:
            return None
        total, weight = 0.0, 0.0
        for batch in self.eval_batches():
            sums = jax.device_get(self.eval_step(self.state.params, self._place(batch)))
            total, weight = total + float(sums[0]), weight + float(sums[1])
        if not weight:
            raise UsageError("the evaluation set has no trained tokens")
        return total / weight

    def _evaluate_into(self, record: dict[str, Any]) -> None:
        loss = self.evaluate()
        if loss is not None:
            record["eval_loss"] = loss
        if self.measure is not None:
            record.update(self.measure(record["step"], model_params(self.config, self.train, self.state.params)))
        if len(record) > 1:
            self.run.log(record)
            self.progress.show(record)
        self._clock = None if record["step"] == 0 else time.monotonic()

    def _report(self, step: int, metrics: Mapping[str, jax.Array], position: Mapping[str, Any], batch: Any, evaluate: bool = False) -> None:
        values = jax.device_get(dict(metrics))
        router = values.pop("router")
        values = {name: value.item() for name, value in values.items()}
        now = time.monotonic()
        # the time of the first step of a process is mostly compilation
        elapsed, self._clock = (now - self._clock if self._clock else None), now
        record = {"step": step, **{k: values[k] for k in ("loss", "grad_norm", "lr", "tokens", "trained_tokens", "skipped")}}
        record["tok_per_s"] = round(values["tokens"] / elapsed, 1) if elapsed else None
        if self.train.router_aux_loss_coef:
            record["aux_loss"] = values["aux_loss"]
        if self.teacher:
            record.update((name, values[name]) for name in ("cross_entropy", "kl"))
        record.update(router_numbers(router))
        spike = self.spike(values["loss"])
        if values["skipped"] or spike is not None:
            record["batch"] = position = {key: value for key, value in position.items() if key != "fingerprint"}
            record["batch_file"] = self.run.keep_batch(step, batch._asdict())
        if spike is not None:
            record["spike"] = spike
            kept = f"; its batch is {record['batch_file']}" if record["batch_file"] else ""
            self.progress.note(f"WARNING: loss {values['loss']:.4f} of step {step} is {spike} sigmas above that of the last steps{kept}")
        if evaluate:
            self._evaluate_into(record)
            self.run.log_router(router_table(step, router))
        else:
            self.run.log(record)
            self.progress.show({**record, "eta_s": elapsed * (self.train.steps - step)} if elapsed else record)
        if values["skipped_in_row"] >= MAX_SKIPPED_IN_ROW:
            raise NumericsError(
                f"loss or gradients were not finite in {MAX_SKIPPED_IN_ROW} steps in a row, the last being step {step} "
                f"(data position {position}); these updates were left out and nothing was saved after them"
            )

    def _save(self, batch: Any) -> None:
        params = saved_params(self.train, self.state.params)
        if not self.all_finite(params).item():
            raise NumericsError(f"parameters are not finite after step {self.step}; nothing was saved")
        hashes = code_hashes(self.config, self.capture_step(self.state, batch).codes) if self.capture_step else None
        meta = orbax_store.Meta(
            model=self.config.to_dict(),
            run=self.train.to_dict(),
            data_state=self.batches.state(),
            quant=self.policy.to_dict() if self.policy else None,
            code_hashes=hashes,
            source=self.source,
        )
        optimizer = (self.state.opt_state, self.state.skipped, self.state.skipped_in_row)
        orbax_store.save(self.run.checkpoints, self.step, params, meta, optimizer, assets=self.assets, keep=self.train.keep)
        self._clock = time.monotonic()


def _check_same_run(meta: orbax_store.Meta, config: GptOssConfig, train: TrainConfig, where: str) -> None:
    """Refuses to continue with settings under which the continuation would not be that of the saved run."""
    changes = []
    for name, old, new in (("model config", meta.model, config.to_dict()), ("run config", meta.run or {}, train.to_dict())):
        # settings that the saved run did not know yet had the effect of their present defaults
        defaults = TrainConfig().to_dict() if name == "run config" else {}
        before, after = {**dict(flat(defaults)), **dict(flat(old))}, dict(flat(new))
        for key in sorted(before.keys() | after.keys()):
            free = name == "run config" and key.startswith(FREE_ON_RESUME)
            if before.get(key) != after.get(key) and not free:
                changes.append(f"{key}: {before.get(key)!r} -> {after.get(key)!r}")
    if changes:
        raise UsageError(f"{where}: cannot be resumed with other settings: {'; '.join(changes)}")
