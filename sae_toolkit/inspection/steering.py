"""Turns features while the language model writes, and compares what it writes with and without that.

Shapes: B sequences of T tokens, D dimensions, S turned features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from sae_toolkit.errors import UserError
from sae_toolkit.evaluation.feature_browser import decode_tokens
from sae_toolkit.evaluation.massive_activations import measure_norm_limits
from sae_toolkit.evaluation.prepared_evaluation import PreparedEvaluation
from sae_toolkit.model.devices import out_of_memory_answered, random_states_restored
from sae_toolkit.model.hooks import hooked
from sae_toolkit.model.language_model import LanguageModel
from sae_toolkit.settings.inspection import Steer, SteeringSettings
from sae_toolkit.text.positions import PositionFilter
from sae_toolkit.text.token_ids import TokenIds

_MOST_LIKELY = 5  # next tokens that are shown
# What SAELens's `encode` keeps of an activation that it normalizes. Its `decode` uses it and forgets it.
_NORMALIZED_BY = ("ln_mu", "ln_std", "x_norm_coeff")


@dataclass(frozen=True)
class Continuation:
    """What the model writes after a prompt.

    Args:
        text: the new tokens as text.
        log_probability: mean over the new tokens of the log of the probability that the model gave them, in nats.
    """

    text: str
    log_probability: float


@dataclass(frozen=True)
class Written:
    """What the model does after a prompt, with or without turned features.

    Args:
        activations: of the turned features at the last token of the prompt, before they are turned.
        next_tokens: the likeliest next tokens, with their probabilities.
        continuations: as many as were asked for.
    """

    activations: tuple[float, ...]
    next_tokens: tuple[tuple[str, float], ...]
    continuations: tuple[Continuation, ...]


def check_steering(steers: Sequence[Steer], groups: Sequence[PreparedEvaluation]) -> None:
    """Checks that the features can be turned.

    Raises:
        UserError: there are several SAEs, the SAE has no such feature, its hook is not one where activations can be
            changed while text is written, or the model has no tokenizer.
    """
    names = [evaluated.file.name for group in groups for evaluated in group.saes]
    if len(names) > 1:
        raise UserError(f"--steer: turns the features of one SAE, and {', '.join(names)} are named; name one of them")
    group, evaluated = groups[0], groups[0].saes[0]
    for steer in steers:
        if steer.feature >= evaluated.sae.cfg.d_sae:
            raise UserError(
                f"--steer {steer.given}: {evaluated.file.name} has the features 0 to {evaluated.sae.cfg.d_sae - 1}"
            )
    if group.hook_name.endswith(".hook_resid_mid"):
        raise UserError(
            f"--steer: not at {group.hook_name}, whose changes the layer's attention would not see; use"
            " an SAE of another hook"
        )
    if isinstance(group.tokenizer, TokenIds):
        raise UserError(f"--steer: it needs a tokenizer, and {group.model.name} has none; name another model")


def write_with_and_without(
    prepared: PreparedEvaluation, model: LanguageModel, steers: Sequence[Steer], settings: SteeringSettings
) -> list[tuple[str, Written, Written]]:
    """Has the model continue each prompt without and with the features turned.

    The SAE's error stays: each activation x becomes x + sum over turned features of (new - old) W_dec, times what the
    SAE divided x by if it normalizes activations. Activations that the SAE is not applied to (special tokens and
    positions that its training left out, massive ones) stay as they are.

    Args:
        prepared: one SAE.
        model: language model, hooked where it is.
        steers: the features and their values.
        settings: prompts and lengths.

    Returns:
        Each prompt, and what is written without and with the features turned. The seed is the same for both.
    """
    prepared = measure_norm_limits(prepared, model, batch_size=1)
    evaluated = prepared.saes[0]
    sae = evaluated.sae.to(model.device)
    results = []
    for prompt in settings.prompt:
        ids = prepared.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if prepared.context.prepend_bos and prepared.tokenizer.bos_token_id is not None:
            ids = [prepared.tokenizer.bos_token_id, *ids]
        if not ids:
            raise UserError("--prompt: is empty, and the model has no token to begin with; give some text")
        if prepared.model.max_context is not None and len(ids) + settings.new_tokens > prepared.model.max_context:
            raise UserError(
                f"--new_tokens {settings.new_tokens}: with {len(ids)} tokens of the prompt more than the"
                f" {prepared.model.max_context} that {prepared.model.name} was made for; lower it"
            )
        tokens_1T = torch.tensor([ids], device=model.device)
        doing = f"--continuations {settings.continuations} --new_tokens {settings.new_tokens}: writing"
        with out_of_memory_answered(doing, "lower them"):
            both = [
                _write(prepared, model, sae, evaluated.positions, tokens_1T, turned, settings)
                for turned in ([], steers)
            ]
        old = _activations(model, sae, tokens_1T, [steer.feature for steer in steers])
        without, with_turned = (Written(old, *each) for each in both)
        results.append((prompt, without, with_turned))
    return results


def _activations(
    model: LanguageModel, sae: SAE[Any], tokens_1T: torch.Tensor, features: Sequence[int]
) -> tuple[float, ...]:
    acts_1D = model.activations(tokens_1T)[:, -1].float()
    with torch.no_grad():
        return tuple(sae.encode(acts_1D)[0, list(features)].tolist())


@torch.no_grad()
def _write(
    prepared: PreparedEvaluation,
    model: LanguageModel,
    sae: SAE[Any],
    positions: PositionFilter,
    tokens_1T: torch.Tensor,
    steers: Sequence[Steer],
    settings: SteeringSettings,
) -> tuple[tuple[tuple[str, float], ...], tuple[Continuation, ...]]:
    tokenizer, n_prompt = prepared.tokenizer, tokens_1T.shape[1]
    ends_at = getattr(model.model.generation_config, "eos_token_id", None) or tokenizer.eos_token_id
    drawn = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    how = GenerationConfig(
        max_new_tokens=settings.new_tokens,
        eos_token_id=ends_at,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
        **(drawn if settings.temperature > 0 else {"do_sample": False}),
    )
    with ExitStack() as stack:
        if steers:
            turn = _Turn(sae, steers, positions)
            stack.enter_context(_token_ids_go_to(turn, model.model))
            stack.enter_context(hooked(model.hook.module, model.hook.side, turn))
        stack.enter_context(_without_own_settings(model.model))
        stack.enter_context(random_states_restored(str(model.device)))
        torch.manual_seed(prepared.seed)
        logits_V = model.model(tokens_1T, use_cache=False).logits[0, -1].float()
        if steers:
            if logits_V.softmax(-1).isnan().any():
                given = " ".join(steer.given for steer in steers)
                raise UserError(f"--steer {given}: the model's predictions are no longer numbers; give smaller values")
            turn.begin()
        written: Any = model.model.generate(  # type: ignore[operator]
            tokens_1T.repeat(settings.continuations, 1),
            attention_mask=torch.ones_like(tokens_1T).repeat(settings.continuations, 1),
            generation_config=how,
        )
    likeliest = logits_V.softmax(-1).topk(min(_MOST_LIKELY, len(logits_V)))
    next_tokens = tuple(
        zip(decode_tokens(tokenizer, likeliest.indices.tolist()), likeliest.values.tolist(), strict=True)
    )
    new_BT = written.sequences[:, n_prompt:]
    log_p_BTV = torch.stack(written.logits, dim=1).float().log_softmax(-1)
    log_p_BT = log_p_BTV.gather(-1, new_BT[..., None])[..., 0]
    continuations = []
    for new_T, log_p_T in zip(new_BT, log_p_BT, strict=True):
        is_end_T = torch.isin(new_T, torch.tensor(ends_at if ends_at is not None else [], device=new_T.device))
        n = int(is_end_T.nonzero()[0]) + 1 if is_end_T.any() else len(new_T)
        text = tokenizer.decode(new_T[:n], skip_special_tokens=True)
        continuations.append(Continuation(str(text), log_p_T[:n].mean().item()))
    return next_tokens, tuple(continuations)


@contextmanager
def _without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which a model generates by what it is told alone.

    Its own settings may hold penalties and cuts, which would hide what a feature does.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _token_ids_go_to(turn: _Turn, model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which `turn` is told the token ids of each pass."""

    def tell(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        turn.tokens_BT = args[0] if args else next(iter(kwargs.values()))

    handle = model.get_input_embeddings().register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def change_of_turning(
    sae: SAE[Any], features_NF: torch.Tensor, turned_S: torch.Tensor | Sequence[int], new_NS: torch.Tensor
) -> torch.Tensor:
    """Returns by how much activations at the hook change, [N, D], when features get new activations.

    Args:
        sae: the SAE, which has just encoded the activations: its decoder undoes what it normalized them by. It still
            can afterwards.
        features_NF: the activations of all features.
        turned_S: indices of the features that are turned.
        new_NS: their new activations.
    """
    turned_NF = features_NF.clone()
    turned_NF[:, turned_S] = new_NS
    normalized_by = {name: vars(sae)[name] for name in _NORMALIZED_BY if name in vars(sae)}
    decoded = []
    for each_NF in (turned_NF, features_NF):
        decoded.append(sae.decode(each_NF))
        vars(sae).update(normalized_by)
    return decoded[0] - decoded[1]


class _Turn:
    """Changes activations [B, T, D] at the hook: each turned feature gets its new activation.

    Passes of one token go on from the pass before; others begin a text, whose first positions may be skipped. The token
    ids of a pass are in `tokens_BT` before it comes to the hook.
    """

    tokens_BT: torch.Tensor

    def __init__(self, sae: SAE[Any], steers: Sequence[Steer], positions: PositionFilter) -> None:
        self._sae = sae
        self._steers = steers
        self._positions = positions
        self._features_S = torch.tensor([steer.feature for steer in steers], device=sae.device)
        self._values_S = torch.tensor([steer.value for steer in steers], device=sae.device)
        self._adds_S = torch.tensor([steer.adds for steer in steers], device=sae.device)
        self._n_seen = 0

    def begin(self) -> None:
        """The next pass begins a text."""
        self._n_seen = 0

    def __call__(self, acts: torch.Tensor) -> torch.Tensor:
        acts_BTD = acts.flatten(2) if acts.ndim > 3 else acts
        features_NF = self._sae.encode(acts_BTD.flatten(0, 1).float())
        old_NS = features_NF[:, self._features_S]
        new_NS = torch.where(self._adds_S, old_NS + self._values_S, self._values_S)
        change_BTD = change_of_turning(self._sae, features_NF, self._features_S, new_NS).reshape(acts_BTD.shape)
        first = max(0, self._positions.skip_positions - self._n_seen)
        change_BTD[:, :first] = 0
        special = torch.tensor(self._positions.special_token_ids, dtype=torch.long, device=self.tokens_BT.device)
        change_BTD[torch.isin(self.tokens_BT, special).to(change_BTD.device)] = 0
        change_BTD[~self._positions.keeps_norms(acts_BTD)] = 0
        self._n_seen += acts_BTD.shape[1]
        return (acts_BTD + change_BTD.to(acts_BTD.dtype)).reshape(acts.shape)


def show_steering(steers: Sequence[Steer], results: Sequence[tuple[str, Written, Written]]) -> str:
    """Returns what is shown of the results: each prompt, and what comes after it without and with turned features."""
    lines = []
    turned = " ".join(steer.given for steer in steers)
    for prompt, without, with_turned in results:
        was = ", ".join(f"{steer.feature}: {old:.3g}" for steer, old in zip(steers, without.activations, strict=True))
        lines += [f"prompt: {prompt}", f"activations at its last token: {was}"]
        for name, written in (("without", without), (f"with {turned}", with_turned)):
            lines += ["", f"{name}: next token " + ", ".join(f"{token!r} {p:.1%}" for token, p in written.next_tokens)]
            for each in written.continuations:
                lines.append(f"  {each.text!r} (mean log probability of a token {each.log_probability:.2f} nats)")
        lines.append("")
    lines.append(
        "The SAE's error is kept: activations change by (new - old activation) x decoder vector and by nothing else"
        " (times their norm, if the SAE normalizes them)."
    )
    return "\n".join(lines)
