"""Loads a training run: its activations, SAEs and trainer, at the first step or at a checkpoint."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TrainingSAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.util import str_to_dtype

from sae_toolkit.activations.cache import ActivationCache, CachedActivations
from sae_toolkit.activations.stream import ActivationStream
from sae_toolkit.files.trust import tensors_only
from sae_toolkit.model.devices import out_of_memory_answered
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.model.loading import load_language_model
from sae_toolkit.saes.checkpoints import load_training_checkpoint
from sae_toolkit.saes.training_form import load_weights, unfold_normalization
from sae_toolkit.steps.activation_sample import LEAST_HELD_OUT
from sae_toolkit.steps.multi_trainer import MultiTrainer
from sae_toolkit.steps.sharded_sae import shard_sae
from sae_toolkit.steps.sparse_topk import sparse_class
from sae_toolkit.training.checkpoints import RunCheckpoints
from sae_toolkit.training.finetuning import Finetuning
from sae_toolkit.training.initial_sae import InitialSAE
from sae_toolkit.training.prepared_run import PreparedRun

log = logging.getLogger(__name__)

_ROWS_OF_RANK = 4  # of held-out text, at least
_LEAST_KEPT = LEAST_HELD_OUT // 2  # activations of held-out text


def open_activations(run: PreparedRun) -> LanguageModel | CachedActivations:
    """Opens the source of a run's activations: the language model, or a cache that loads it when it is needed.

    Raises:
        UserError: the model cannot be loaded, or the cache holds other activations.
    """

    def load() -> LanguageModel:
        model = load_model(run)
        if not run.evaluates and not run.finetunes:
            model.keep_only_up_to_hook()
        return model

    if run.cache_directory is None:
        with run.ranks.one_first():
            return load()
    cache = ActivationCache(run.cache_directory, run.cache_parameters(), run.all_rows_NT, sum(run.widths))
    return CachedActivations(cache, load, run.cfg.device)


def load_model(run: PreparedRun) -> LanguageModel:
    """Loads the language model of a run, with all layers. They are compiled if the run asks for it.

    Raises:
        UserError: as `load_language_model`.
    """
    n_devices = run.n_devices if run.ranks.is_alone else None  # several ranks have no --n_devices
    model = load_language_model(run.model, run.hook_names, run.llm_device, run.lm_dtype, n_devices)
    if run.cfg.compile_llm:
        model.compile_layers(run.cfg.llm_compilation_mode)
    return model


class Training:
    """The SAEs, the trainer and the stream of activations of a run, ready for the next step.

    `total` is the number of tokens of the whole run.

    The constructor measures the norms of the first activations of a new run, or loads the checkpoint of a resumed run.

    Args:
        run: the run.
        activations: what `open_activations` returned.

    Raises:
        UserError: no activations are left to train on, the memory does not suffice, or the checkpoint does not fit the
            run.
    """

    def __init__(self, run: PreparedRun, activations: LanguageModel | CachedActivations) -> None:
        self.run = run
        self.activations = activations
        self.cfg = cfg = run.cfg
        self.ranks = run.ranks
        batch_size = run.optimization.train_batch_size_tokens
        self.total = run.phases.n_steps * batch_size
        self.stream = ActivationStream(
            activations,
            run.rows_NT,
            run.positions,
            run.assistant_NT,
            batch_size=batch_size,
            buffer_size=cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)]),
            mix_fraction=cfg.activations_mixing_fraction,
            rows_per_forward=cfg.store_batch_size_prompts,
            total=run.phases.n_before * batch_size,
            seed=run.optimization.seed,
            dtype=str_to_dtype(cfg.dtype),
            ranks=run.ranks,
            widths=run.widths,
            saes_per_hook=run.optimization.seeds,
            device=cfg.device,
            epochs=run.epochs,
            row_ids=run.phases.stream_rows,
        )
        trainer_cfg = cfg.to_sae_trainer_config()
        trainer_cfg.logger = LoggingConfig(log_to_wandb=False)  # the training loop records instead
        with _out_of_memory_answered(run):
            self.saes = {name: self._create_sae(each) for name, each in zip(run.sae_names, run.cfgs, strict=True)}
            self.trainer = MultiTrainer(trainer_cfg, self.saes, run.ranks, run.sae.target_l0)
            for each_trainer in self.trainer.trainers.values():
                each_trainer.products_in_bfloat16 = run.products_in_bfloat16
                if run.initialized_from and each_trainer.l0_control is not None:
                    each_trainer.l0_control.begin_with_given_weight()
            self.checkpoints = RunCheckpoints(run, self.trainer, self.stream)
            self.finetuning = Finetuning(run, activations, self.trainer, self.stream)
            if run.resume_from is not None:
                with tensors_only(f"--resume {run.resume_from}"):
                    load_training_checkpoint(run.resume_from, self.trainer, self.stream)
                log.info("resuming after %s tokens", f"{self.trainer.n_training_samples:,}")
            else:
                _calibrate(run, self.trainer, self.stream)
                for each in self.trainer.trainers.values() if run.initialized_from else ():
                    unfold_normalization(each.sae, each.activation_scaler)
            self._hold_out_samples()
        none = [None] * len(run.cfgs)
        self.max_norms = dict(zip(run.sae_names, self.stream.max_activation_norms or none, strict=True))
        for name, each, median_norm in zip(run.sae_names, run.cfgs, self.stream.median_norms or none, strict=True):
            norms = {"max_activation_norm": self.max_norms[name], "median_activation_norm": median_norm}
            lineage = {"initialized_from": found} if (found := run.initialized_from.get(each.hook_name)) else {}
            seed = {"seed": each.seed} if run.optimization.seeds > 1 else {}
            _record_training(self.saes[name], each, run.metadata() | norms | lineage | seed)
        if cfg.compile_sae:
            for sae in self.saes.values():
                sae.training_forward_pass = torch.compile(sae.training_forward_pass, mode=cfg.sae_compilation_mode)

    def _hold_out_samples(self) -> None:
        """Runs held-out text for the calibration of L0, if there is enough; otherwise that is on what is trained on."""
        run, samples = self.run, [each.sample for each in self.trainer.trainers.values()]
        if not run.calibrates_on_held_out or not any(sample is not None for sample in samples):
            return
        assert run.held_out_NT is not None
        # A shard needs all activations. Where rows are few, each rank runs all of them too: none must be without any.
        shares = not run.is_sharded and len(run.held_out_NT) >= _ROWS_OF_RANK * self.ranks.size
        dtype = self.stream.source.dtype
        acts_ND = self.stream.of_other_rows(run.held_out_NT, run.held_out_assistant_NT, dtype, shares=shares)
        if not shares and not run.is_sharded:
            acts_ND = acts_ND[self.ranks.rank :: self.ranks.size]  # each activation counts once
        if sum(n for (n,) in self.ranks.counts(len(acts_ND))) < _LEAST_KEPT:  # if the assistant hardly speaks there
            return
        for sample, acts in zip(samples, self.stream.at_each_hook(acts_ND), strict=True):
            assert sample is not None  # the SAEs differ in their hooks or seeds only
            sample.hold(acts)

    def _create_sae(self, cfg: LanguageModelSAERunnerConfig[Any]) -> TrainingSAE[Any]:
        """Returns the SAE that this rank trains. If features are sharded, rank 0 makes all of them on its CPU first."""
        initial_sae = self.run.initial_saes.get(cfg.hook_name)  # of rank 0, which sends its weights to the others
        if not self.run.is_sharded:
            return create_sae(cfg, initial_sae)
        on_cpu = copy(cfg)
        on_cpu.device, on_cpu.sae = "cpu", replace(cfg.sae, device="cpu")
        return shard_sae(create_sae(on_cpu, initial_sae) if self.ranks.is_main else None, cfg.device, self.ranks)


def _out_of_memory_answered(run: PreparedRun) -> AbstractContextManager[None]:
    """Returns a context manager that answers an error about memory that has run out before a run's next step."""
    if run.resume_from is None:
        return out_of_memory_answered(
            f"{' '.join(run.sae.width_words)}: creating the SAE on {run.cfg.device}",
            "lower it or --n_batches_in_buffer, or free memory there",
        )
    return out_of_memory_answered(
        f"--resume {run.resume_from}: loading it on {run.cfg.device}",
        "the checkpoint is unchanged: free memory there, or resume with another --device",
    )


def _record_training(sae: TrainingSAE[Any], cfg: LanguageModelSAERunnerConfig[Any], more: dict[str, Any]) -> None:
    """Fills the metadata of cfg.json with the fields that SAELens's runner records, and with those of `more`."""
    for name in (
        "dataset_path hook_name model_name model_class_name hook_head_index context_size seqpos_slice"
        " model_from_pretrained_kwargs prepend_bos exclude_special_tokens sequence_separator_token"
        " disable_concat_sequences use_chat_formatting"
    ).split():
        sae.cfg.metadata[name] = getattr(cfg, name)
    for name, value in more.items():
        sae.cfg.metadata[name] = value


def create_sae(cfg: LanguageModelSAERunnerConfig[Any], initial_sae: InitialSAE | None = None) -> TrainingSAE[Any]:
    """Returns the SAE at the first step, for activations that are not normalized yet.

    Args:
        cfg: configuration of the run, which the SAE has, whatever it begins with.
        initial_sae: the SAE whose weights it begins with; None for random weights that follow from the seed.

    Raises:
        UserError: the SAE to begin with cannot be loaded, or does not fit.
    """
    torch.manual_seed(cfg.seed)
    sae_class, _ = get_sae_training_class(cfg.sae.architecture())
    sae_cfg = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
    sae = sparse_class(sae_class, sae_cfg, compiled=cfg.compile_sae)(sae_cfg)
    if initial_sae is not None:
        load_weights(sae, initial_sae.load(cfg.sae, cfg.hook_name, str(cfg.device)))
    return sae


def _calibrate(run: PreparedRun, trainer: MultiTrainer, stream: ActivationStream) -> None:
    """Measures the first batches of the stream, which the run also trains on.

    They give the norm limits, the normalization and, if the run wants it, the decoder's bias: their mean, once
    normalized.
    """
    if not run.measures_first_activations:
        stream.calibrate(1, None)  # only to record the median norm
        return
    cfg, mode = run.cfg, run.cfg.sae.normalize_activations
    log.info("measuring activation norms on %d batches", cfg.n_batches_for_norm_estimate)
    acts_ND = stream.calibrate(cfg.n_batches_for_norm_estimate, run.max_norm_multiple)
    for each, acts in zip(trainer.trainers.values(), stream.at_each_hook(acts_ND), strict=True):
        if mode == "expected_average_only_in":  # SAELens uses only the norms
            batches = stream.ranks.gather(acts.norm(dim=-1, keepdim=True))
            each.activation_scaler.estimate_scaling_factor(each.sae.cfg.d_in, iter(batches), len(batches))
        elif mode == "covariance_whitening":
            gathered = stream.ranks.gather(acts.contiguous())
            batches = [piece for part in gathered for piece in part.split(cfg.train_batch_size_tokens)]
            each.activation_scaler.estimate_whitening(each.sae.cfg.d_in, iter(batches), len(batches))
        if run.sae.b_dec_init_method == "mean":
            sums_D = stream.ranks.sum(each.activation_scaler(acts).sum(dim=0, dtype=torch.float32))
            n = sum(n for (n,) in stream.ranks.counts(len(acts)))
            each.sae.b_dec.data.copy_(sums_D / n)
