"""SAELens's trainer with a step that does not wait for the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.steps.selection import select_among
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE
from sae_toolkit.steps.target_l0 import L0Control

_ADJUSTED = ("l0", "l1")  # SAELens's schedules of the sparsity weights l0_coefficient and l1_coefficient
_COUNTS = ("n_not_finite", "n_not_finite_in_a_row")

# How many steps old the count of dead features may be that a step goes by.
_STEPS_BEHIND = 4


class Trainer(SAETrainer[Any, Any]):
    """SAELens's trainer: schedules, statistics, logs and checkpoints are its own.

    Its step is written anew, to the same result: Adam is fused, firings are counted where the activations are
    sparse, dead features are counted some steps ahead, and a step whose loss or gradient is not finite is not
    applied. With the SAEs of `sparse_topk` none of it waits for the device, but for shards. On a CUDA device the SAE's
    products are in TF32, on a CPU in bfloat16 where `products_in_bfloat16` says so.

    `n_not_finite` counts the steps that were not applied, and `n_not_finite_in_a_row` those since the last that was;
    both are on the device.

    Where there are several ranks, each steps on its own part of a batch, all of them begin with the weights of rank
    0, and gradients, firings, selections and readings are those of the whole batch: the SAE does not depend on how
    many ranks there are, but for the rounding of sums.

    Args:
        ranks: who share a batch of `cfg.train_batch_size_samples`.
        target_l0: how many features of a token the sparsity weight is adjusted to let be active; None leaves it.
    """

    products_in_bfloat16 = False

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: TrainingSAE[Any],
        data_provider: Iterator[torch.Tensor],
        ranks: Ranks = ALONE,
        target_l0: float | None = None,
    ) -> None:
        super().__init__(cfg, sae, data_provider)
        self.l0_control = None
        if target_l0 is not None:
            turn = cfg.lr * math.sqrt(sae.cfg.d_in)
            self.l0_control = L0Control(target_l0, turn, cfg.device, sae.cfg.architecture(), cfg.total_training_steps)
        self._fuse_optimizer()
        self.ranks = ranks
        self._sums: list[Any] = []  # of gradients, on their way
        if not ranks.is_alone:
            for tensor in self._tensors_of_all_ranks():
                ranks.broadcast_tensor(tensor)
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.register_post_accumulate_grad_hook(
                        lambda parameter: self._sums.append(ranks.start_sum(parameter.grad))
                    )
            select_among(sae, ranks, cfg.train_batch_size_samples)
        self.n_not_finite = torch.zeros((), dtype=torch.long, device=cfg.device)
        self.n_not_finite_in_a_row = torch.zeros_like(self.n_not_finite)
        self._counts_of_dead: deque[_Reading] = deque()

    def _tensors_of_all_ranks(self) -> list[torch.Tensor]:
        """What is the same on all ranks; the gradients of what is trained of it are added up."""
        return [*self.sae.parameters(), *self.sae.buffers()]

    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        """One step on raw activations [B, D]; the caller advances `n_training_steps`, as with SAELens's.

        Where memory is short, on a single rank, it is tried once more with all that the allocator can free.
        """
        if isinstance(self.sae, SparseTopKTrainingSAE):
            self.sae.dead_bound = self._dead_bound()
        with _fast_products(batch.device, self.products_in_bfloat16):
            try:
                return self._step(batch)
            except torch.OutOfMemoryError:
                if not self.ranks.is_alone:  # the others would wait for this one where they are
                    raise
            # out of the handler, whose traceback holds the step's tensors
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()
            return self._step(batch)

    def _step(self, batch: torch.Tensor) -> TrainStepOutput:
        n_samples = len(batch) if self.ranks.is_alone else self.cfg.train_batch_size_samples
        sae_in = self.activation_scaler(batch.to(self.sae.device))
        self.sae.train()
        buffers = [buffer.clone() for buffer in self.sae.buffers()]  # such as BatchTopK's threshold
        with self.autocast_if_enabled:
            output = self.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=self.dead_neurons,
                    coefficients=self.get_coefficients(),
                    n_training_steps=self.n_training_steps,
                    is_logging_step=self._is_logging_step(),
                )
            )
        if isinstance(self.sae, BatchTopKTrainingSAE):  # moved towards the least activation of this rank's
            self.ranks.minimum(self.sae.topk_threshold)

        share = len(batch) / n_samples  # SAELens's losses are means over tokens
        (output.loss * share if share != 1 else output.loss).backward()
        self.ranks.finish(self._sums)
        grad_norm = self._grad_norm()
        torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), 1.0, grad_norm)
        firings_F, loss = self._of_whole_batch(_count_firings(output.feature_acts), output.loss.detach(), share)
        not_finite = ~(loss + grad_norm).isfinite()
        self.n_not_finite += not_finite
        self.n_not_finite_in_a_row = (self.n_not_finite_in_a_row + 1) * not_finite
        self.optimizer.found_inf = not_finite.float()  # the fused kernel skips the step, as under torch's GradScaler
        self._lay_out_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for buffer, before in zip(self.sae.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(not_finite, before, buffer))
        self.n_training_samples += n_samples
        self._record_firings(firings_F)
        if self.l0_control is not None and not self._warms_up():
            pace = self.optimizer.param_groups[0]["lr"] / self.cfg.lr
            self.l0_control.update(firings_F.sum() / self.cfg.train_batch_size_samples, pace, not_finite)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        return output

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        self.after_loading()

    def after_loading(self) -> None:
        """Goes on from the state that it has been given."""
        self._counts_of_dead.clear()
        self._fuse_optimizer()

    def load_checkpoint(self, checkpoint_path: Path) -> None:
        """Weights and state, as SAELens saves them."""
        self.load_trainer_state(checkpoint_path)
        self.sae.load_weights_from_checkpoint(checkpoint_path)

    def whole(self, *, finished: bool) -> Trainer | None:
        """The trainer of all features, to be saved; None where that is another rank's.

        Args:
            finished: whether Adam's moments are of no use any more.
        """
        return self

    def state_beside_saelens(self) -> dict[str, Any]:
        """What `save_trainer_state` does not know of."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        return state | ({"l0_control": self.l0_control.state_dict()} if self.l0_control else {})

    def load_state_beside_saelens(self, state: dict[str, Any]) -> None:
        for name in _COUNTS:
            setattr(self, name, state[name].to(self.cfg.device))
        if self.l0_control:
            self.l0_control.load_state_dict(state["l0_control"])

    def _warms_up(self) -> bool:
        """Whether SAELens still raises the sparsity weight to its value."""
        return any(self.n_training_steps < each.warm_up_steps for each in self.coefficient_schedulers.values())

    def get_coefficients(self) -> dict[str, Any]:
        """The weights of the loss now; the one that is adjusted is on the device."""
        coefficients = super().get_coefficients()
        if self.l0_control is None:
            return coefficients
        factor = self.l0_control.factor.float()
        return {name: value * factor if name in _ADJUSTED else value for name, value in coefficients.items()}

    @property
    def found_weight(self) -> dict[str, float]:
        """The sparsity weight that the adjustment came to, under SAELens's name for it; empty where there is none."""
        if self.l0_control is None:
            return {}
        factor = self.l0_control.found_factor
        schedules = self.coefficient_schedulers.items()
        return {f"{name}_coefficient": each.final_value * factor for name, each in schedules if name in _ADJUSTED}

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        for name, value in self.found_weight.items():
            self.sae.cfg.metadata[name] = value

    def _fuse_optimizer(self) -> None:
        for group in self.optimizer.param_groups:
            group["fused"] = True
        for parameter, state in self.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):  # the fused kernel reads all as one piece of memory
                moment = state[name]
                if moment.device != parameter.device or moment.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter).copy_(moment)

    def _lay_out_gradients(self) -> None:
        """Spares a copy. On a CPU the fused kernel goes over memory, place after place; of a gradient that is not
        row-major, as that of `sparse_topk`'s W_enc, it first makes a row-major copy that it then does not use.
        """
        for weight in self.sae.parameters():
            grad = weight.grad
            if grad is None or grad.ndim != 2 or grad.device.type != "cpu":
                continue
            if grad.t().is_contiguous() and weight.t().is_contiguous():
                weight.grad = grad.t().view(grad.shape)

    def _grad_norm(self) -> torch.Tensor:
        # Of a matrix that of each feature first, which on a CPU takes half the time.
        norms = [p.grad.norm(dim=p.grad.stride().index(1)) for p in self.sae.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(norms)

    @torch.no_grad()
    def _of_whole_batch(
        self, firings_F: torch.Tensor, loss: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """How often each feature fired [F], and the loss [], given those of this rank's part."""
        if self.ranks.is_alone:
            return firings_F, loss
        wide = torch.promote_types(loss.dtype, torch.float32)  # counts do not fit into float16
        both = self.ranks.sum(torch.cat((firings_F.to(wide), loss.to(wide)[None] * share)))
        return both[:-1], both[-1]

    @torch.no_grad()
    def _record_firings(self, firings_F: torch.Tensor) -> None:
        self.act_freq_scores += firings_F
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(firings_F > 0, 0)
        self.n_frac_active_samples += self.cfg.train_batch_size_samples

    def firing_counts(self) -> torch.Tensor:
        """How often each feature fired in the last `n_frac_active_samples` tokens, [F]."""
        return self.act_freq_scores

    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """SAELens's readings of a step, over the whole batch."""
        return self._readings(output, n_training_samples) | {
            f"details/{name}_coefficient": float(value) for name, value in self.get_coefficients().items()
        }

    def _readings(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        if self.ranks.is_alone:
            return super().build_train_step_log_dict(output, n_training_samples)
        share = len(output.sae_in) / self.cfg.train_batch_size_samples

        def mean(value: Any) -> torch.Tensor:
            return self.ranks.sum(torch.as_tensor(value, device=self.sae.device).detach() * share)

        whole = replace(
            output,
            sae_in=torch.cat(self.ranks.gather(output.sae_in)),
            sae_out=torch.cat(self.ranks.gather(output.sae_out.detach())),
            loss=mean(output.loss),
            losses={name: mean(loss) for name, loss in output.losses.items()},
        )
        reading = super().build_train_step_log_dict(whole, n_training_samples)
        return reading | {"metrics/l0": float(mean(reading["metrics/l0"]))}

    def _dead_bound(self) -> tuple[int, int] | None:
        """At most how many features are dead now, of all and on the rank that has the most; None on a CPU, where
        counting costs nothing.

        A feature that is dead in n steps has by now been silent for all but n steps of the window. Counting those
        gives a number that can be read n steps later, when the device has long computed it.
        """
        if self.act_freq_scores.device.type == "cpu":
            return None
        soon = self.n_forward_passes_since_fired > self.cfg.dead_feature_window - _STEPS_BEHIND
        self._counts_of_dead.append(_Reading(self._count(soon)))
        if len(self._counts_of_dead) <= _STEPS_BEHIND:
            return None
        total, most = self._counts_of_dead.popleft().values()
        return total, most

    def _count(self, features_F: torch.Tensor) -> torch.Tensor:
        """How many of all features, and on the rank that has the most: [2]."""
        return features_F.sum().expand(2)


@torch.no_grad()
def _count_firings(feature_acts: torch.Tensor) -> torch.Tensor:
    """How often each feature fired, [F]."""
    if not feature_acts.is_sparse:
        return (feature_acts != 0).sum(0)
    fired_N = (feature_acts._values() > 0).float()
    return fired_N.new_zeros(feature_acts.shape[1]).index_add_(0, feature_acts._indices()[1], fired_N)


@contextmanager
def _fast_products(device: torch.device, in_bfloat16: bool) -> Iterator[None]:
    """Lets products of float32 matrices take TF32 on a CUDA device, where asked bfloat16 on a CPU, which add up in
    float32; nothing else after it.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif in_bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Reading:
    """Numbers that are on their way from a CUDA device."""

    def __init__(self, numbers: torch.Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        with torch.cuda.device(numbers.device):
            self._host.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def values(self) -> list[int]:
        self._arrived.synchronize()
        return self._host.tolist()
