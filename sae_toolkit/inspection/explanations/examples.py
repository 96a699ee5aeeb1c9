"""Chooses with delphi's code what explains a feature and what an explanation is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae_toolkit.inspection.explanations.delphi import (
    ConstructorConfig,
    LatentRecord,
    SamplerConfig,
    TensorBuffer,
    constructor,
    draw_tests,
    sampler,
)
from sae_toolkit.inspection.latents import WINDOW
from sae_toolkit.settings.inspection import ExplanationSettings


class FeatureExamples:
    """Examples of features, from their activations in delphi's format.

    Args:
        latents: directory of the hook that `write_latents` returned.
        settings: how many examples.
        tokenizer: tokenizer of the language model.
    """

    def __init__(self, latents: Path, settings: ExplanationSettings, tokenizer: Any) -> None:
        self._latents = latents
        self._tokenizer = tokenizer
        self._constructor = ConstructorConfig(
            example_ctx_len=WINDOW, min_examples=settings.explain_min_windows, n_non_activating=settings.explain_tests
        )
        self._sampler = SamplerConfig(
            n_examples_train=settings.explain_examples, n_examples_test=settings.explain_tests
        )

    def of(self, features: Sequence[int], n_features: int) -> tuple[list[LatentRecord], int]:
        """Returns the examples of the first features that fire in enough windows, and how many were left out before.

        Features that fire in fewer windows than `--explain_min_windows`, or in almost all, are left out. `train` holds
        the examples that explain, `test` others in which the feature fires, and `not_active` as many in which it does
        not. delphi 0.1.3 draws `train` and `test` from the same examples, so that a part of those that test were shown
        before; here `test` is drawn, by the same code, from those that were not shown.

        Args:
            features: indices, in the order in which they are looked at.
            n_features: how many are wanted.
        """
        found, tokens = self._activations(features)
        records: list[LatentRecord] = []
        for n, feature in enumerate(features):
            if len(records) == n_features:
                return records, n - n_features
            if feature in found and (record := self._record(found[feature], tokens)) is not None:
                records.append(record)
        return records, len(features) - len(records)

    def _activations(self, features: Sequence[int]) -> tuple[dict[int, Any], torch.Tensor]:
        """Returns the activations of each feature that fires, and the tokens [rows, context]."""
        found: dict[int, Any] = {}
        tokens = torch.empty(0, 0)
        for file in self._latents.glob("*.safetensors"):
            first, last = map(int, file.stem.split("_"))
            here = torch.tensor([feature for feature in features if first <= feature <= last])
            buffer = TensorBuffer(str(file), self._latents.name, here)
            tokens = buffer.tokens
            if len(here):
                found |= {data.latent.latent_index: data for data in buffer}
        return found, tokens

    def _record(self, data: Any, tokens: torch.Tensor) -> LatentRecord | None:
        # delphi's own check comes after it has built all examples.
        windows = (data.activation_data.locations[:, :2] @ torch.tensor([tokens.shape[1], 1]) // WINDOW).unique()
        n_silent = tokens.numel() // WINDOW - len(windows)
        if len(windows) < self._constructor.min_examples or n_silent < self._constructor.n_non_activating:
            return None
        record = constructor(
            LatentRecord(data.latent), data.activation_data, self._constructor, tokens, self._tokenizer
        )
        record = sampler(record, self._sampler, self._tokenizer)
        shown = {id(example) for example in record.train}
        others = [example for example in record.examples if id(example) not in shown]
        record.test = draw_tests(
            others, record.max_activation, self._sampler.n_examples_test, self._sampler.n_quantiles, "quantiles"
        )
        for example in record.test:
            example.str_tokens = self._tokenizer.batch_decode(example.tokens)
        record.examples = record.examples[:1]  # the strongest, whose activation delphi looks up; the rest is not needed
        return record
