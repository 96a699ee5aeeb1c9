"""SAELens's trainer with a training step that does not wait for the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_toolkit.distributed.ranks import ALONE, Ranks
from sae_toolkit.errors import is_out_of_memory
from sae_toolkit.steps.activation_sample import ActivationSample
from sae_toolkit.steps.calibration import Calibration, calibrate, has_calibration
from sae_toolkit.steps.delayed_counts import STEPS_BEHIND, DelayedCounts
from sae_toolkit.steps.finetune_loss import PredictionLoss, backward_with
from sae_toolkit.steps.fused_adam import clip_and_step, fuse
from sae_toolkit.steps.selection import select_among
from sae_toolkit.steps.sparse_topk import SparseTopKTrainingSAE
from sae_toolkit.steps.target_l0 import L0Control

_ADJUSTED = ("l0", "l1")  # SAELens's schedules of the sparsity weights l0_coefficient and l1_coefficient
_COUNTS = {"n_not_finite", "n_not_finite_in_a_row", "finetune_weight"}


class Trainer(SAETrainer[Any, Any]):
    """SAELens's trainer with a faster step. Schedules, statistics, logs and checkpoints are SAELens's own.

    A step has the same result as SAELens's. Adam is fused, firings are counted from sparse activations, and the number
    of dead features is bounded some steps before it is used. A step whose loss or gradient is not finite is not
    applied. With the SAEs of `sparse_topk` the step does not wait for the device, unless the SAE is sharded. On a CUDA
    device the SAE's products are in TF32. If `products_in_bfloat16` is set, the encoder's product takes its inputs in
    bfloat16 there, and on a CPU all products do.

    `n_not_finite` is the number of steps that were not applied, and `n_not_finite_in_a_row` is their number since the
    last applied step. `finetune_weight` is the weight of the loss beside the SAE's own in the last step that had one,
    and otherwise 0. All three are on the device.

    With several ranks, each rank steps on its own part of a batch. All ranks start with the weights of rank 0, and
    gradients, firings, selections and metrics are those of the whole batch. So the SAE does not depend on the number of
    ranks, except for the rounding of sums.

    `sample` holds activations to calibrate its L0 on; None if it has none to calibrate (`calibration.py`).
    `calibration` is that of the SAE at its last step, in a trainer that `whole` returned.

    Args:
        cfg: SAELens's configuration.
        sae: the SAE to train.
        data_provider: not used by `step`; SAELens's own training loop reads it.
        ranks: the ranks that share a batch of `cfg.train_batch_size_samples` tokens.
        target_l0: mean number of active features of a token. The sparsity weight is adjusted until it is reached. None
            for a weight that is not adjusted.
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
        fuse(self.optimizer)
        self.ranks = ranks
        self._sums: list[Any] = []  # the sums of gradients over the ranks that are still running
        if not ranks.is_alone:
            for tensor in self._replicated_tensors():
                ranks.broadcast_tensor(tensor)
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.register_post_accumulate_grad_hook(
                        lambda parameter: self._sums.append(ranks.start_sum(parameter.grad))
                    )
            select_among(sae, ranks, cfg.train_batch_size_samples)
        self.n_not_finite = torch.zeros((), dtype=torch.long, device=cfg.device)
        self.n_not_finite_in_a_row = torch.zeros_like(self.n_not_finite)
        self.finetune_weight = torch.zeros((), dtype=torch.float, device=cfg.device)
        self._counts_of_dead = DelayedCounts()
        self.calibration: Calibration | None = None
        # On how many tokens `calibrate` was called last since the last step, and what it found.
        self._latest: tuple[int | None, Calibration | None] | None = None
        self.sample: ActivationSample | None = None
        if has_calibration(sae.cfg, target_l0):
            self.sample = ActivationSample(cfg.device, self._sample_ranks())

    def _sample_ranks(self) -> Ranks:
        """Returns the ranks that hold different parts of a batch."""
        return self.ranks

    @property
    def _is_on_cuda(self) -> bool:
        return self.act_freq_scores.device.type == "cuda"

    @property
    def _encodes_in_bfloat16(self) -> bool:
        """Whether the encoder's product is to be converted. A CPU's products are, without this, in `_fast_products`."""
        return self.products_in_bfloat16 and self._is_on_cuda and self.sae.dtype == torch.float32

    def _replicated_tensors(self) -> list[torch.Tensor]:
        """Returns the tensors that are equal on all ranks. Their gradients, if any, are summed."""
        return [*self.sae.parameters(), *self.sae.buffers()]

    def step(self, batch: torch.Tensor, prediction_loss: PredictionLoss | None = None) -> TrainStepOutput:
        """Takes one step on raw activations [B, D]. The caller advances `n_training_steps`, as with SAELens's trainer.

        If memory runs out on a single rank, the step is tried once more, after the allocator's cache is emptied.

        Args:
            batch: the activations. With a loss beside the SAE's own they may be a few more or fewer than a batch, and
                are counted as one.
            prediction_loss: a loss to add to the SAE's own, for a single rank. Its weight makes its gradient at the
                reconstructions as large as that of the mean squared error.
        """
        if isinstance(self.sae, SparseTopKTrainingSAE):
            self.sae.dead_bound = self._dead_bound()
            self.sae.encodes_in_bfloat16 = self._encodes_in_bfloat16
        buffers = [buffer.clone() for buffer in self.sae.buffers()]  # such as BatchTopK's threshold
        with _fast_products(batch.device, self.products_in_bfloat16):
            output = self._forward_and_backward(batch, buffers, prediction_loss)
            self._apply(output, len(batch), buffers)
        self._latest = None
        if self.sample is not None:
            self.sample.add(batch, self.n_training_steps)
        # Whole contexts are a batch on average only, so that the steps of a run stay as many as its schedules count.
        counted = self.ranks.is_alone and prediction_loss is None
        self.n_training_samples += len(batch) if counted else self.cfg.train_batch_size_samples
        return output

    def _forward_and_backward(
        self, batch: torch.Tensor, buffers: list[torch.Tensor], prediction_loss: PredictionLoss | None
    ) -> TrainStepOutput:
        """Computes the gradients. If memory runs out, tries again with an empty cache and the buffers as they were."""
        try:
            return self._compute_gradients(batch, prediction_loss)
        except (RuntimeError, MemoryError) as error:
            # The other ranks would wait forever for one that tries again.
            if not self.ranks.is_alone or not is_out_of_memory(error):
                raise
        # The second try is outside the handler, because the traceback there keeps the step's tensors alive.
        self.optimizer.zero_grad()
        for buffer, before in zip(self.sae.buffers(), buffers, strict=True):
            buffer.copy_(before)
        if self._is_on_cuda:
            torch.cuda.empty_cache()
        return self._compute_gradients(batch, prediction_loss)

    def _share(self, n_tokens: int) -> float:
        """Returns which share of the whole batch this rank's `n_tokens` are."""
        return 1 if self.ranks.is_alone else n_tokens / self.cfg.train_batch_size_samples

    def _compute_gradients(self, batch: torch.Tensor, prediction_loss: PredictionLoss | None) -> TrainStepOutput:
        sae_in = self.activation_scaler(batch.to(self.sae.device))
        self.sae.train()
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
        if isinstance(self.sae, BatchTopKTrainingSAE):  # it was updated by this rank's smallest activation
            self.ranks.minimum(self.sae.topk_threshold)

        if prediction_loss is not None:
            output, weight = backward_with(prediction_loss, output, self.activation_scaler)
            self.finetune_weight = torch.where(weight.isfinite(), weight, self.finetune_weight)
            return output
        share = self._share(len(batch))  # SAELens's losses are means over tokens
        (output.loss * share if share != 1 else output.loss).backward()
        self.ranks.finish(self._sums)
        return output

    def _apply(self, output: TrainStepOutput, n_tokens: int, buffers: list[torch.Tensor]) -> None:
        """Clips the gradients, applies them, and counts the firings. Leaves everything as it was if not finite.

        Args:
            output: result of the forward pass.
            n_tokens: number of tokens in this rank's part of the batch.
            buffers: copies of the SAE's buffers from before the step.
        """
        grad_norm = self._grad_norm()
        share = self._share(n_tokens)
        firings_F, loss = self._over_whole_batch(_count_firings(output.feature_acts), output.loss.detach(), share)
        not_finite = ~(loss + grad_norm).isfinite()
        self.n_not_finite += not_finite
        self.n_not_finite_in_a_row = (self.n_not_finite_in_a_row + 1) * not_finite
        clip_and_step(self.optimizer, grad_norm, not_finite)
        self.optimizer.zero_grad()
        for buffer, before in zip(self.sae.buffers(), buffers, strict=True):
            buffer.copy_(torch.where(not_finite, before, buffer))
        n_tokens_of_all = n_tokens if self.ranks.is_alone else self.cfg.train_batch_size_samples
        self._record_firings(firings_F, n_tokens_of_all)
        if self.l0_control is not None and not self._warms_up():
            pace = self.optimizer.param_groups[0]["lr"] / self.cfg.lr
            self.l0_control.update(firings_F.sum() / n_tokens_of_all, pace, not_finite)
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        super().load_trainer_state(checkpoint_path)
        self.after_loading()

    def after_loading(self) -> None:
        """Prepares the trainer for the state that was loaded into it."""
        self._counts_of_dead.clear()
        self._latest = None
        fuse(self.optimizer)

    def load_checkpoint(self, checkpoint_path: Path) -> None:
        """Loads the weights and the trainer's state that SAELens saved."""
        self.load_trainer_state(checkpoint_path)
        self.sae.load_weights_from_checkpoint(checkpoint_path)

    def whole(self, *, finished: bool) -> Trainer | None:
        """Returns a trainer of the whole SAE with its calibration, to be saved. Collective.

        It returns None on ranks other than 0 if the SAE is sharded.

        Args:
            finished: whether Adam's moments may be left out.
        """
        whole = copy(self)
        whole.calibration = self.calibrate()
        if self.sample is not None and not finished:
            whole.sample = self.sample.of_all_ranks()
        return whole

    def calibrate(self, n_tokens: int | None = None) -> Calibration | None:
        """Returns what gives the SAE as it is now the L0 that was asked for; None if nothing does. Collective.

        Args:
            n_tokens: how many tokens of held-out text to calibrate on; None for all.
        """
        if self.sample is None:
            return None
        if self._latest is None or self._latest[0] != n_tokens:
            found = calibrate(
                self.sae,
                self.activation_scaler,
                self.sample,
                self.sae.cfg.k if self.l0_control is None else self.l0_control.target,
                self.n_training_steps,
                at_once=self.cfg.train_batch_size_samples,
                n_tokens=n_tokens,
                ranks=self.ranks,
            )
            self._latest = n_tokens, found
        return self._latest[1]

    def state_beside_saelens(self) -> dict[str, Any]:
        """Returns the part of the state that SAELens's `save_trainer_state` does not save."""
        state: dict[str, Any] = {name: getattr(self, name) for name in _COUNTS}
        # The next steps' bounds set the shapes of products, and so the rounding of a resumed run.
        state["counts_of_dead"] = self._counts_of_dead.state()
        if self.l0_control:
            state["l0_control"] = self.l0_control.state_dict()
        if self.sample is not None:
            state["sample"] = self.sample.state_dict()
        if self.calibration is not None:  # SAELens's files hold the calibrated tensors
            tensors = self.sae.state_dict()
            state["not_calibrated"] = {name: tensors[name].cpu().clone() for name in self.calibration.tensors}
        return state

    def load_state_beside_saelens(self, state: dict[str, Any]) -> None:
        """Loads what `state_beside_saelens` returned."""
        for name in _COUNTS & state.keys():  # checkpoints of earlier versions have no finetune_weight
            setattr(self, name, state[name].to(self.cfg.device))
        if self._is_on_cuda:
            self._counts_of_dead.load(state.get("counts_of_dead", []))
        if self.l0_control:
            self.l0_control.load_state_dict(state["l0_control"])
        if self.sample is not None and "sample" in state:  # checkpoints of earlier versions have none
            self.sample.load_state_dict(state["sample"])
        tensors = self.sae.state_dict()
        for name, tensor in state.get("not_calibrated", {}).items():
            tensors[name].copy_(tensor)

    def _warms_up(self) -> bool:
        """Returns whether SAELens is still raising the sparsity weight to its final value."""
        return any(self.n_training_steps < each.warm_up_steps for each in self.coefficient_schedulers.values())

    def get_coefficients(self) -> dict[str, Any]:
        """Returns the current weights of the loss terms. An adjusted weight is a tensor on the device."""
        coefficients = super().get_coefficients()
        if self.l0_control is None:
            return coefficients
        factor = self.l0_control.factor.float()
        return {name: value * factor if name in _ADJUSTED else value for name, value in coefficients.items()}

    @property
    def found_weight(self) -> dict[str, float]:
        """The sparsity weight that the adjustment found, by SAELens's name; empty if the weight is not adjusted."""
        if self.l0_control is None:
            return {}
        factor = self.l0_control.found_factor
        schedules = self.coefficient_schedulers.items()
        return {f"{name}_coefficient": each.final_value * factor for name, each in schedules if name in _ADJUSTED}

    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        found = self.found_weight
        if weight := float(self.finetune_weight):
            found["finetune_weight"] = weight
        for name, value in found.items():
            self.sae.cfg.metadata[name] = value

    def _grad_norm(self) -> torch.Tensor:
        # The norm of a matrix is computed from the norms of its features, which takes half the time on a CPU.
        norms = [p.grad.norm(dim=p.grad.stride().index(1)) for p in self.sae.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(norms)

    @torch.no_grad()
    def _over_whole_batch(
        self, firings_F: torch.Tensor, loss: torch.Tensor, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the firings [F] and the loss [] of the whole batch, given those of this rank's part."""
        if self.ranks.is_alone:
            return firings_F, loss
        wide = torch.promote_types(loss.dtype, torch.float32)  # float16 cannot hold the counts
        both = self.ranks.sum(torch.cat((firings_F.to(wide), loss.to(wide)[None] * share)))
        return both[:-1], both[-1]

    @torch.no_grad()
    def _record_firings(self, firings_F: torch.Tensor, n_tokens: int) -> None:
        self.act_freq_scores += firings_F
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(firings_F > 0, 0)
        self.n_frac_active_samples += n_tokens

    def firing_counts(self) -> torch.Tensor:
        """Returns how often each feature fired in the last `n_frac_active_samples` tokens, [F]."""
        return self.act_freq_scores

    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        """Returns SAELens's metrics of a step, over the whole batch."""
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
        """Returns upper bounds of the number of dead features: on all ranks together, and on the rank with the most.

        It returns None if the caller has to count the dead features itself. On a CPU that costs nothing.

        If a feature is dead n steps from now, it has been silent for at least the window less n steps by now. Such
        features are counted now and the number is read n steps later, when the device has long computed it.
        """
        if not self._is_on_cuda:
            return None
        soon = self.n_forward_passes_since_fired > self.cfg.dead_feature_window - STEPS_BEHIND
        counts = self._counts_of_dead.exchange(self._count(soon))
        return None if counts is None else (counts[0], counts[1])

    def _count(self, features_F: torch.Tensor) -> torch.Tensor:
        """Returns how many of the features [F] are true, [2]: on all ranks together, and on the rank with the most."""
        return features_F.sum().expand(2)


@torch.no_grad()
def _count_firings(feature_acts: torch.Tensor) -> torch.Tensor:
    """Returns how often each feature fired, [F]."""
    if not feature_acts.is_sparse:
        return (feature_acts != 0).sum(0)
    fired_N = (feature_acts._values() > 0).float()
    return fired_N.new_zeros(feature_acts.shape[1]).index_add_(0, feature_acts._indices()[1], fired_N)


@contextmanager
def _fast_products(device: torch.device, in_bfloat16: bool) -> Iterator[None]:
    """Sets the precision of products of float32 matrices: TF32 on a CUDA device and, if `in_bfloat16`, bfloat16 on a
    CPU. Sums stay in float32, and the precision is restored at the end.
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
