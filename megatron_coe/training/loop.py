"""The training loop on megatron.core alone: steps, validation, checkpoints and reports."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_coe.data.indexed import unigram_entropy
from megatron_coe.moe.balance import collect_balance
from megatron_coe.training.batches import BatchSource
from megatron_coe.training.checkpoint import Progress
from megatron_coe.training.checks import num_microbatches
from megatron_coe.training.metrics import Reporter
from megatron_coe.training.objective import (
    Batch,
    LossFunction,
    count_valid_tokens,
    loss_scale,
    make_loss_function,
)
from megatron_coe.training.profiling import StepProfiler
from megatron_coe.training.saving import Saver
from megatron_coe.training.settings import Settings
from megatron_coe.training.setup import Trainee
from megatron_coe.training.signals import StopRequest


@dataclass(frozen=True)
class Validation:
    """The held-out sequences that every validation reads."""

    source: BatchSource
    samples: int


@dataclass(frozen=True)
class StepFigures:
    """What a training step leaves to be reported."""

    totals: torch.Tensor
    """[summed loss, valid tokens] of this rank."""
    lr: float
    grad_norm: float
    seconds: float


class Trainer:
    """Runs the steps of a rank; its methods are collectives of all ranks.

    Args:
        settings: of the run.
        trainee: what is trained, changed in place.
        train: the training sequences.
        validation: None when there is no held-out set.
        progress: how far the trainee has come, counted on in place.
        reporter: where figures go, on rank 0; None on the others.
    """

    def __init__(
        self,
        settings: Settings,
        trainee: Trainee,
        train: BatchSource,
        validation: Validation | None,
        progress: Progress,
        reporter: Reporter | None,
        saver: Saver | None = None,
    ) -> None:
        self.settings = settings
        self.trainee = trainee
        self.train = train
        self.validation = validation
        self.progress = progress
        self.reporter = reporter
        self.saver = saver or Saver(settings.checkpoint, settings.to_yaml())
        self.num_microbatches = num_microbatches(settings, dist.get_world_size())

    def run(self, stop: StopRequest | None = None) -> signal.Signals | None:
        """Train from the present step to the last one, and save it.

        A signal that `stop` has received on any rank ends the run before the next step, saved.

        Returns:
            that signal; None when the last step was done.
        """
        train, log = self.settings.train, self.settings.log
        last = min(train.steps, train.stop_step or train.steps)
        profiler = StepProfiler(log, enabled=dist.get_rank() == 0)
        stop = stop or StopRequest()
        saved = self.progress.step
        while self.progress.step < last:
            self.saver.poll()
            if reason := stop.agreed(self.train.device):
                if self.progress.step > saved:
                    self.save()
                self.saver.finish()
                if self.reporter is not None:
                    self.reporter.say(f"stopped by {reason.name} after step {self.progress.step}")
                return reason
            step = self.progress.step + 1
            with profiler.step(step):
                outcome = self.step()
            record = {}
            if step in (1, last) or _due(step, log.interval):
                record |= self.figures(outcome)
            if step == train.steps or _due(step, train.eval_interval):
                record |= self.evaluate()
            if step == train.steps and self.validation and self.reporter:
                # What a model without any context reaches, beside what this one has reached.
                record["unigram_entropy"] = unigram_entropy(self.validation.source.dataset)
            if self.reporter is not None:
                self.reporter.advance()
                if record:
                    self.reporter.record(step, record)
            if step == last or _due(step, self.settings.checkpoint.save_interval):
                self.save()
                saved = step
        self.saver.finish()
        return None

    def step(self) -> StepFigures:
        """One update of the weights."""
        started_s = time.perf_counter()
        trainee = self.trainee
        batches = self.train.training(self.progress.samples, self.num_microbatches)
        valid_tokens = count_valid_tokens(batches, parallel_state.get_data_parallel_group())
        positions = self.settings.train.global_batch_size * trainee.provider.seq_length
        scale = loss_scale(valid_tokens, positions)
        for chunk in trainee.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        trainee.optimizer.zero_grad()
        clear_aux_losses_tracker()  # so that reports show one step, wherever the run began
        totals = self._forward_backward(lambda: iter(batches), self.num_microbatches, scale)
        lr = get_canonical_lr_for_logging(trainee.optimizer.param_groups)
        _, grad_norm, _ = trainee.optimizer.step()
        trainee.schedule.step(1)
        self.progress.step += 1
        self.progress.samples += self.settings.train.global_batch_size
        return StepFigures(totals, lr, grad_norm, time.perf_counter() - started_s)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Cross-entropy per valid token of the whole held-out set; empty when there is none."""
        if self.validation is None:
            return {}
        for chunk in self.trainee.chunks:
            chunk.eval()
        source, samples = self.validation.source, self.validation.samples
        count = -(-samples // (source.micro_batch_size * source.replicas))
        # The interleaved schedule wants a multiple of the stages; what is too much is masked.
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        count = -(-count // stages) * stages
        totals = self._forward_backward(lambda: source.validation(samples, count), count)
        return {"valid_loss": _mean_loss(totals)}

    def validate(self) -> None:
        """Report the validation loss of the trainee as it is, on the console only."""
        loss = self.evaluate().get("valid_loss")
        if self.reporter is not None:
            measured = "no held-out set (data.valid)" if loss is None else f"{loss:.6f}"
            self.reporter.say(f"step {self.progress.step} | valid loss {measured}")

    def save(self) -> None:
        """Write a checkpoint, or begin to, where `checkpoint.save` names a folder."""
        self.saver.save(self.trainee, self.progress)

    def figures(self, step: StepFigures) -> dict[str, float]:
        """What is reported of a training step."""
        train, provider = self.settings.train, self.trainee.provider
        return {
            "train_loss": _mean_loss(step.totals),
            "lr": step.lr,
            "grad_norm": float(step.grad_norm),
            "tokens_per_second": train.global_batch_size * provider.seq_length / step.seconds,
            **self._balance(),
        }

    def _balance(self) -> dict[str, float]:
        """Balance losses of the latest step: mean over layers, and layer by layer."""
        provider = self.trainee.provider
        values = collect_balance(provider, self.num_microbatches, self.train.device)
        layers = [index for index, moe in enumerate(provider.moe_layer_pattern) if moe]
        record = {}
        for loss, value_CL in values.items():
            for t, value_L in enumerate(value_CL[:, layers].tolist(), start=1):
                record[f"balance/{loss}/iteration_{t}"] = sum(value_L) / len(value_L)
                for layer, value in zip(layers, value_L, strict=True):
                    record[f"balance/{loss}/iteration_{t}/layer_{layer + 1}"] = value
        return record

    def _forward_backward(
        self, batches: Callable[[], Iterator[Batch]], count: int, scale: float | None = None
    ) -> torch.Tensor:
        """Run `count` micro-batches, forward only without a scale.

        Args:
            batches: gives a new iterator over them (each model chunk reads its own).

        Returns:
            [summed loss, valid tokens] of this rank's micro-batches, float64: to be summed over
            all ranks, and 0 where the loss is not computed or another rank computes it too.
        """
        reports = get_forward_backward_func()(
            forward_step_func=partial(forward_step, scale=scale or 0.0),
            data_iterator=[batches() for _ in self.trainee.chunks],
            model=self.trainee.chunks,
            num_microbatches=count,
            seq_length=self.trainee.provider.seq_length,
            micro_batch_size=self.train.micro_batch_size,
            forward_only=scale is None,
        )
        if not reports or parallel_state.get_tensor_model_parallel_rank() > 0:
            return torch.zeros(2, dtype=torch.float64, device=self.train.device)
        return torch.stack(reports).sum(dim=0)


def forward_step(
    batches: Iterator[Batch], chunk: torch.nn.Module, scale: float
) -> tuple[torch.Tensor, LossFunction]:
    """One micro-batch through one model chunk, as Megatron's schedules call it."""
    batch = get_batch_on_this_cp_rank(dict(next(batches)))
    output = chunk(
        batch["tokens"],
        batch["position_ids"],
        None,  # causal attention needs no mask: padding stands on the right
        labels=batch["labels"],
        loss_mask=batch["loss_mask"] * scale,  # what multi-token prediction weighs its losses by
    )
    return output, make_loss_function(batch["loss_mask"], scale)


def _mean_loss(totals: torch.Tensor) -> float:
    """Loss per valid token out of the ranks' [summed loss, valid tokens]; 0 without any token."""
    totals = totals.clone()
    dist.all_reduce(totals)
    loss_sum, tokens = totals.tolist()
    return loss_sum / max(tokens, 1.0)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
