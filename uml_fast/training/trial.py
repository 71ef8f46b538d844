"""One trial: one mode and one seed, from data to result, resumable at any step."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uml_fast.config import RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.distributed.parallel import choose, like, local, whole
from uml_fast.distributed.ranks import ALONE, Ranks
from uml_fast.distributed.watch import Watch
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch
from uml_fast.packing.resume import State, join
from uml_fast.runtime.device import resolve_device
from uml_fast.runtime.memory import keep_freed_memory
from uml_fast.runtime.stop import StopSignal
from uml_fast.runtime.trace import Trace, span
from uml_fast.training import checkpoint
from uml_fast.training.log import RunLog, SilentLog, write_json
from uml_fast.training.measure import (
    AlignedSources,
    PackedSource,
    aligned_probes,
    measure,
    pack_source,
    run_metric,
)
from uml_fast.training.memory import explained
from uml_fast.training.meter import Meter, combine
from uml_fast.training.optim import learning_rate, load_optimizer_tensors, optimizer_tensors
from uml_fast.training.saving import Saver, hold, load_on_all
from uml_fast.training.start import build_model, plan_mix, shares_of
from uml_fast.training.step import StepResult, TrainStep

logger = logging.getLogger("uml_fast")

Held = list[tuple[Layout, Tensor]]
"""Of each pack of a step its layout and the sample of each slot."""


class TrainingError(RuntimeError):
    """A trial that cannot go on; the message says where it stopped and the last good state."""


class Stopped(Exception):
    """The trial was asked to stop and has saved a checkpoint."""


class Trial:
    """Trains one mode with one seed; ``run`` continues from the newest checkpoint in its folder.

    All ``ranks`` call the same methods; the first one evaluates, logs and writes.
    """

    def __init__(
        self, run_config: RunConfig, mode: str, seed: int, folder: Path, ranks: Ranks = ALONE
    ) -> None:
        self.config = config = run_config.for_mode(mode)
        self.mode, self.seed, self.folder, self.ranks = mode, seed, folder, ranks
        self.device = resolve_device(config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.task = config.load(seed, mode)
        self.mix, self.layouts = plan_mix(run_config, mode, self.task, seed)
        self.model = build_model(config, self.task, seed).to(self.device)
        ranks.copy_first(list(self.model.state_dict().values()))
        needs_other = config.optim.ema or (
            choose(config.dist, self.model, ranks, self.device) == "fsdp"
        )
        self.whole = copy.deepcopy(self.model).cpu() if needs_other and ranks.is_first else None
        """On the first rank, what evaluates weights that ranks share, and averaged ones."""
        self.train_step = TrainStep(self.model, config, seed, ranks)
        checkpoints = self.folder / "checkpoints"
        self.saver = Saver(checkpoints, config.checkpoint.keep, ranks, config.dist.timeout_s)
        self.evaluated: tuple[PackedSource | None, PackedSource] | None = None
        """What a probe is fitted on, if any, and validation samples, on the rank that evaluates."""
        if ranks.is_first:
            fitted = self.task.source(config.target) if config.eval.probe else None
            self.evaluated = (
                None if fitted is None else pack_source(fitted, self.device, config),
                pack_source(self.task.validation, self.device, config),
            )
        self.step = 0
        self.best: dict[str, Any] = {"metric": None, "step": 0, "failures": 0}
        self.best_weights: dict[str, Tensor] = {}
        self.unchecked: list[tuple[int, Tensor, Held]] = []
        """Steps whose loss was not read yet: (step, loss, samples of its packs)."""
        self.began = 0.0
        """When training began or went on, of ``time.perf_counter``."""
        self.flag = torch.zeros(())
        """Of the step before: on how many ranks a stop was asked for."""
        self.last: tuple[int, Tensor, Held] | None = None
        """The newest step whose loss was read."""

    def run(
        self,
        stop: StopSignal,
        log: RunLog | SilentLog,
        trace: Trace | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Train to the end and measure.

        Args:
            stop: read between steps; one rank that is asked to stop stops all after the same step.
            log: takes one record per logged step and validation.
            trace: takes the events of loading, steps, validations and checkpoints.
            after_step: called behind every step.

        Returns:
            The trial's result as it stands in summary.json.

        Raises:
            Stopped: ``stop`` was set on a rank; the state is saved.
            TrainingError: a loss or the weights are not finite.
        """
        config = self.config
        with (
            self._loader(trace) as loader,
            Watch(self.ranks, config.dist.timeout_s, self.folder) as watch,
            self._memory_explained(),
        ):
            self._resume(loader)
            log.begin(self.mode, self.seed, resumed_step=self.step)
            meter = Meter(self.model, config, self.task.train, loader, self.device)
            self.began = time.perf_counter()
            is_over = not self.ranks.any(not self._is_over(loader))
            while not (is_over or self._is_patience_over()):
                watch.tick(f"step {self.step + 1}")
                with span(trace, "wait for a pack"):
                    before, last = self._packs(loader)
                with span(trace, "step", step=self.step + 1):
                    goes_on = not self._is_over(loader, after=1)
                    flags = (bool(stop), goes_on)
                    result = self.train_step(last, self.step, flags, *before)
                after_step()
                log.tick(self.step + 1)
                held = [(p.layout, p.sample_S.clone()) for p in (*before, last)]
                self.unchecked.append((self.step, result.loss, held))
                self.step += 1
                if result.flags is not None and config.mix.stop_with:
                    goes_on = bool(result.flags[1])
                is_last = is_over = not goes_on
                is_logged = is_last or self._is_due(config.log_every)
                if is_logged or self.device.type == "cpu":
                    self._check_finite()
                record = self._record(result, meter) if is_logged else {}
                if config.eval.every and (is_last or self._is_due(config.eval.every)):
                    with span(trace, "validation"), watch.paused(), meter.paused():
                        record["val"] = self._validate()
                if record:
                    log.write(self.step, **record)
                is_last = is_last or self._is_patience_over()
                is_stopping = self._is_stopping(result, stop) and not is_last
                self.saver.check()
                if is_last or is_stopping or self._is_due(config.checkpoint.every):
                    with span(trace, "checkpoint"), meter.paused():
                        self._save(loader)
                if is_stopping:
                    self.saver.wait()
                    raise Stopped
            self.saver.wait()
        log.evaluating()
        measured = self._result()
        log.end(measured)
        return measured

    def _loader(self, trace: Trace | None) -> Loader:
        return Loader(
            self.task.train, self.layouts, self.mix, self.seed, trace=trace,
            shares=shares_of(self.config), target=self.config.target, device=self.device,
            rank=self.ranks.rank, world=self.ranks.world,
        )  # fmt: skip

    def _packs(self, loader: Loader) -> tuple[list[PackedBatch], PackedBatch]:
        """The packs of a step; the loader's last one holds until the next is asked for."""
        before = [next(loader)[0].clone() for _ in range(self.config.optim.accumulate - 1)]
        return before, next(loader)[0]

    def _memory_explained(self) -> contextlib.AbstractContextManager[None]:
        strategy = choose(self.config.dist, self.model, self.ranks, self.device)
        return explained(
            self.config, self.model, self.layouts, self.device, self.ranks, strategy,
            lambda: f"step {self.step + 1} of {self.mode} seed {self.seed}",
        )  # fmt: skip

    def _is_over(self, loader: Loader, after: int = 0) -> bool:
        """Whether ``after`` more steps are all, or the modality that the trial stops with ends."""
        mix = self.config.mix
        seen = loader.epochs() if mix.stop_with else {}
        has_ended = mix.stop_with in seen and seen[mix.stop_with] >= mix.stop_epochs
        return has_ended or self.step + after >= self.config.steps

    def _is_stopping(self, result: StepResult, stop: StopSignal) -> bool:
        """Whether a rank was asked to stop, as the sums of a step said it to all.

        On a GPU those of the step before, which are there already.
        """
        if result.flags is None:
            return bool(stop)
        flag = result.flags[0]
        if self.device.type == "cuda":
            flag, self.flag = self.flag, flag
        return bool(flag)

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _record(self, result: StepResult, meter: Meter) -> dict[str, Any]:
        record: dict[str, Any] = {"loss": float(result.loss)}
        losses = {name: float(loss) for name, loss in result.parts.items()}
        record["losses"] = {name: loss for name, loss in losses.items() if not math.isnan(loss)}
        record["lr"] = learning_rate(self.step - 1, self.config.steps, self.config.optim)
        if result.grad_norm is not None:
            record["grad_norm"] = float(result.grad_norm)
        seconds = time.perf_counter() - meter.started
        lap = meter.lap()
        record["save_pct"] = 100 * self.saver.held_up_s / (time.perf_counter() - self.began)
        if self.ranks.world == 1:
            return record | lap | {"recompiles": self.train_step.recompiles}
        waited, self.train_step.waited_s = self.train_step.waited_s, 0.0
        lap["wait_pct"] = {str(self.ranks.rank): 100 * self.ranks.world * waited / seconds}
        exchanged = self.train_step.exchange_pct(seconds)
        lap |= {} if exchanged is None else {"comm_pct": exchanged}
        lap = combine(self.ranks.gather(lap)) | {"ranks": self.ranks.world}
        return record | lap | {"recompiles": self.train_step.recompiles}

    def _check_finite(self) -> None:
        """Stop at a loss that is not finite."""
        for step, loss, held in self.unchecked:
            if not torch.isfinite(loss):
                self._stop_at(step, f"the loss is {float(loss)}", held)
        self.last = self.unchecked[-1] if self.unchecked else self.last
        self.unchecked.clear()

    def _check_weights(self) -> None:
        """Stop at weights that are not finite, before they are saved or measured."""
        norms = torch.stack(torch._foreach_norm([local(p) for p in self.model.parameters()]))
        if self.ranks.any(not torch.isfinite(norms).all()) and self.last is not None:
            step, _, held = self.last
            self._stop_at(step, "the weights are not finite", held)

    def _stop_at(self, step: int, what: str, held: Held) -> None:
        own: dict[str, list[str]] = {}
        for layout, sample_S in held:
            for i, region in enumerate(layout.regions):
                source, samples = self.task.source(region.name), sample_S[layout.slot_slice(i)]
                found = [source.key(s) for s in samples.tolist() if s >= 0]
                own[region.name] = own.get(region.name, []) + found
        keys: dict[str, list[str]] = {}
        for part in self.ranks.gather(own):
            for name, found in part.items():
                keys[name] = keys.get(name, []) + found
        path = self.folder / "nonfinite.json"
        if self.ranks.is_first:
            write_json(path, {"step": step + 1, "what": what, "samples": keys})
        try:
            self.saver.wait()
            newest = checkpoint.load_latest(self.folder / "checkpoints")
            kept = f"the checkpoint of step {newest.step} is kept" if newest else "none was saved"
        except checkpoint.CheckpointError as e:
            kept = str(e)
        raise TrainingError(
            f"{self.mode} seed {self.seed}: {what} at step {step + 1}. The samples of that step "
            f"are in {path}; checkpoints: {kept}. Try a lower --optim.lr or --optim.clip-norm 1"
        )

    def _validate(self) -> float:
        """The metric on the validation samples; remembers the best weights if patience is set."""
        weights = whole(self._weights())
        value = self.ranks.from_first(lambda: self._metric(weights))
        if self.config.eval.patience:
            sign = -1 if self.config.metric == "error" else 1
            if self.best["metric"] is None or sign * value > sign * self.best["metric"]:
                self.best = {"metric": value, "step": self.step, "failures": 0}
                self.best_weights = {k: v.detach().clone() for k, v in self._weights().items()}
            else:
                self.best["failures"] += 1
        return value

    def _weights(self) -> dict[str, Tensor]:
        """What is evaluated: the weights, or their average."""
        return self.model.state_dict() | self.train_step.averaged

    def _metric(self, weights: dict[str, Tensor]) -> float:
        assert self.evaluated is not None
        with self._plain(weights) as model:
            return run_metric(model, self.config, *self.evaluated, self.task.class_names)

    @contextlib.contextmanager
    def _plain(self, weights: dict[str, Tensor]) -> Iterator[Uml]:
        """A model that one rank can evaluate alone."""
        if self.whole is None:
            yield self.model
            return
        self.whole.to(self.device).load_state_dict(weights)
        yield self.whole
        self.whole.cpu()

    def _is_patience_over(self) -> bool:
        patience = self.config.eval.patience
        return bool(patience) and self.best["failures"] >= patience

    def _save(self, loader: Loader) -> None:
        self._check_finite()
        self._check_weights()
        self._write(join(self.ranks.gather(loader.state_dict())))

    def _write(self, loader_state: State) -> None:
        tensors = {f"model/{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema/{k}": v for k, v in self.train_step.averaged.items()}
        tensors |= {f"best/{k}": v for k, v in self.best_weights.items()}
        state = optimizer_tensors(self.train_step.optimizer, self.model)
        tensors |= {f"optimizer/{k}": v for k, v in state.items()}
        meta = {
            "mode": self.mode,
            "seed": self.seed,
            "loader": loader_state,
            "best": self.best,
        }
        held = hold(tensors, self.ranks)
        if held is not None:
            self.saver.save(self.step, held, meta)

    def _resume(self, loader: Loader) -> None:
        newest = self.folder / "checkpoints"
        own = self.model.state_dict()
        saved = load_on_all(newest, own, self.ranks)
        if saved is None:
            return

        def part(prefix: str) -> dict[str, Tensor]:
            names = [k.removeprefix(prefix) for k in saved.tensors if k.startswith(prefix)]
            return {k: like(own[k], saved.tensors[prefix + k]) for k in names}

        self.model.load_state_dict(part("model/"))
        if self.train_step.average is not None:
            self.train_step.average.load(part("ema/"))
        self.best_weights, self.best = part("best/"), saved.meta["best"]
        prefix = "optimizer/"
        state = {
            k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)
        }
        load_optimizer_tensors(self.train_step.optimizer, self.model, state)
        try:
            loader.load_state_dict(saved.meta["loader"])
        except ValueError as e:
            raise checkpoint.CheckpointError(
                f"{newest} holds a run that cannot be continued: {e}. Use --resume never to start "
                "anew, or train with the data it had"
            ) from e
        self.step = saved.step
        logger.info("%s seed %d: continues at step %d", self.mode, self.seed, self.step)

    def _result(self) -> dict[str, Any]:
        weights = whole(self.best_weights or self._weights())
        return self.ranks.from_first(lambda: self._measure(weights))

    def _measure(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        assert self.evaluated is not None
        if self.best_weights and self.whole is None:
            self.model.load_state_dict(weights)
        test = pack_source(self.task.test, self.device, self.config)
        target, validation = self.evaluated
        names = self.task.class_names
        probes: dict[str, dict[str, float]] = {}
        with self._plain(weights) as model:
            measured = measure(model, self.config, target, test, names, validation)
            if self.task.aligned and self.config.eval.probe:
                aligned = AlignedSources.of(self.task, self.config, self.device)
                probes = aligned_probes(model, self.config, aligned, names)
        return {
            "mode": self.mode, "seed": self.seed, "steps": self.step,
            "probe": measured.probe, "head": measured.head, "error": measured.error,
            "validation": measured.validation, "probes": probes,
            "baselines": dict(self.task.baselines),
        }  # fmt: skip
