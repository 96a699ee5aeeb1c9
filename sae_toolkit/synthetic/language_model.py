"""A causal language model around a synthetic model of SAELens, for whatever reads activations and predictions.

A row of its text begins with a token that says which samples come: the number of the row. The activations at each
position are a sample of the synthetic model. An output head predicts the next token from them, and the tokens of the
text are drawn from these predictions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from sae_lens.synthetic import SyntheticModel
from sae_lens.synthetic.synthetic_model import SYNTHETIC_MODEL_CONFIG_FILENAME
from sae_lens.util import temporary_seed
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sae_toolkit.errors import UserError, one_line

ROW_LENGTH = 1024

_BLOCK = 256  # samples that are drawn at once, with a seed of their own
_FEATURES_OF_TOKEN = 8  # features that make a token more or less likely
_LOGIT_STD = 3.0
_SAMPLES_FOR_SCALE = 2048
_NOT_DRAWN = ("constant", "exponential", "linear")  # SAELens's magnitudes that do not depend on its seed


class SyntheticConfig(PreTrainedConfig):
    """Sizes of the language model around a synthetic model."""

    model_type = "sae_lens_synthetic"

    num_features: int = 64
    hidden_size: int = 64
    vocab_size: int = 64
    num_hidden_layers: int = 1
    max_position_embeddings: int = ROW_LENGTH
    tie_word_embeddings: bool = False


class _Samples(nn.Module):
    """Token ids [B, T] -> samples of the synthetic model [B, T, D], which the first token of each row chooses.

    Without a synthetic model, as where only shapes are asked for, each token stands for one feature.
    """

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_features, config.hidden_size))
        self.synthetic: list[SyntheticModel] = []  # a list, as it is no submodule: it stays on the CPU, in float32
        self._last: tuple[tuple[int, ...], torch.Tensor] | None = None

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        if not self.synthetic:
            return self.weight[tokens_BT % len(self.weight)]
        # The passes with and without an SAE ask for the same rows one after the other.
        asked = (tokens_BT.shape[1], *tokens_BT[:, 0].tolist())
        if self._last is None or self._last[0] != asked:
            rows = [samples_of_row(self.synthetic[0], row, tokens_BT.shape[1]) for row in asked[1:]]
            self._last = asked, torch.stack(rows)
        return self._last[1].to(self.weight.device, self.weight.dtype, copy=True)


class _Decoder(PreTrainedModel):
    """The part without the output head, as Transformers' models have one."""

    config_class = SyntheticConfig
    base_model_prefix = "model"

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = _Samples(config)
        self.layers = nn.ModuleList([nn.Identity() for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        hidden_BTD = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD)
        return hidden_BTD


class SyntheticForCausalLM(PreTrainedModel):
    """The language model. Its only layer does nothing: `blocks.0.hook_resid_post` has the synthetic activations."""

    config_class = SyntheticConfig
    base_model_prefix = "model"

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self.model = _Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_decoder(self) -> nn.Module:
        return self.model

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)))

    @property
    def synthetic(self) -> SyntheticModel:
        """The model whose features are known."""
        return self.model.embed_tokens.synthetic[0]


AutoConfig.register(SyntheticConfig.model_type, SyntheticConfig)
AutoModelForCausalLM.register(SyntheticConfig, SyntheticForCausalLM)


def synthetic_config(directory: Path, where: str) -> SyntheticConfig:
    """Returns the sizes of the language model around a synthetic model.

    Raises:
        UserError: the configuration in the directory cannot be read, or gives another model at each load.
    """
    try:
        cfg = json.loads((directory / SYNTHETIC_MODEL_CONFIG_FILENAME).read_text())
        n_features, width = int(cfg["num_features"]), int(cfg["hidden_dim"])
        magnitudes = [cfg.get(name) for name in ("mean_firing_magnitudes", "std_firing_magnitudes")]
        are_drawn = any(isinstance(each, dict) and each["generator_name"] not in _NOT_DRAWN for each in magnitudes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {SYNTHETIC_MODEL_CONFIG_FILENAME} cannot be read: {one_line(error)}") from error
    if are_drawn and cfg.get("seed") is None:
        raise UserError(
            f"{where}: has no seed in {SYNTHETIC_MODEL_CONFIG_FILENAME}, and its magnitudes are drawn: SAELens draws"
            " others each time it loads the model; make one with a seed"
        )
    # Each row has a token of its own to begin with, so the vocabulary bounds the number of samples.
    return SyntheticConfig(
        num_features=n_features, hidden_size=width, vocab_size=4096 if n_features <= 4096 else 16_384
    )


def load_synthetic(directory: Path, device: str, dtype: torch.dtype, where: str) -> SyntheticForCausalLM:
    """Loads a synthetic model, and returns the language model around it.

    Args:
        directory: as `synthetic_directory` returns it.
        device: device of the activations and logits. Samples are drawn on the CPU, so that they are the same anywhere.
        dtype: dtype of the activations and logits.
        where: the flag and the model, for messages.

    Raises:
        UserError: the configuration in the directory cannot be read. What else is damaged raises SAELens's errors.
    """
    config = synthetic_config(directory, where)
    synthetic = SyntheticModel.load_from_disk(directory).requires_grad_(False)
    model = SyntheticForCausalLM(config)
    features_FD = synthetic.feature_dict.feature_vectors
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(features_FD)
        model.lm_head.weight.copy_(_head(synthetic, config.vocab_size))
    model.model.embed_tokens.synthetic.append(synthetic)
    return cast(SyntheticForCausalLM, nn.Module.to(model.requires_grad_(False), device=device, dtype=dtype))


def _head(synthetic: SyntheticModel, vocab_size: int) -> torch.Tensor:
    """Returns the weights [V, D] of the output head: each token reads a few features, drawn at random.

    The logits of a sample have a standard deviation of `_LOGIT_STD` over the tokens, on average.
    """
    generator = torch.Generator().manual_seed((synthetic.cfg.seed or 0) + 5)
    features_FD = synthetic.feature_dict.feature_vectors
    of_token_VM = torch.randint(len(features_FD), (vocab_size, _FEATURES_OF_TOKEN), generator=generator)
    strength_VM = torch.randn(of_token_VM.shape, generator=generator)
    weight_VD = torch.zeros(vocab_size, features_FD.shape[1])
    for feature_V, strength_V in zip(of_token_VM.T, strength_VM.T, strict=True):
        weight_VD += strength_V[:, None] * features_FD[feature_V]
    with temporary_seed(synthetic.cfg.seed or 0):
        acts_ND = _sample(synthetic, _SAMPLES_FOR_SCALE)
    return weight_VD * (_LOGIT_STD / (acts_ND @ weight_VD.T).std(dim=1).mean())


def samples_of_row(synthetic: SyntheticModel, row: int, n_positions: int) -> torch.Tensor:
    """Returns the activations [n_positions, D] of the first positions of a row. They depend on its number alone."""
    blocks = []
    for block in range(-(-n_positions // _BLOCK)):
        seed = np.random.SeedSequence((synthetic.cfg.seed or 0, row, block)).generate_state(1)[0]
        with temporary_seed(int(seed)):
            blocks.append(_sample(synthetic, _BLOCK))
    return torch.cat(blocks)[:n_positions]


def _sample(synthetic: SyntheticModel, n: int) -> torch.Tensor:
    """Returns samples [n, D]. Few features of each are active, so a sparse product is faster than SAELens's own."""
    features_NF = synthetic.activation_generator.sample(n)
    return synthetic.feature_dict(features_NF.to_sparse())
