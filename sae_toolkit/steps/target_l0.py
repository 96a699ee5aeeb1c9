"""The sparsity weight, found while training: of SAEs whose L0 is an outcome and not a setting."""

from __future__ import annotations

import math
from typing import Any

import torch

NEAR_TARGET = 0.1  # how far from the target, as a share of it, an L0 may be
# SAELens's recommendation for JumpReLU (its guide to training), and the encoder that follows, as in Anthropic's setup.
# With SAELens's defaults thresholds begin at 0.01 and move by at most the learning rate a step.
JUMPRELU = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True,
    "pre_act_loss_coefficient": 3e-6,
}

# Of the weight that was given, where it starts, and over which share of the run L0 is to come down. One that is too
# strong kills features, and these do not come back; those of a JumpReLU die the more easily: at once and from a tenth
# of the weight 36% ended dead, in this way 0.5% (2,304 features, 488 steps).
_START = {"standard": 0.1, "gated": 0.1, "jumprelu": 0.003}
_RAMP = {"standard": 0.0, "gated": 0.0, "jumprelu": 0.8}
# Chosen by runs of 480 and 1,000 steps of standard and gated SAEs on real activations, which began with weights from a
# twentieth of the right one to fifty times it.
_FURTHEST = math.log(1000)  # from the weight that was given, either way
_MEMORY = 0.9  # of the running L0, for each step
_PROPORTIONAL = 0.5
_INTEGRAL = 0.6  # e-folds in the steps that turn a feature by its length
_DOWN = 3.0  # times as fast where the L0 is too low, as features die then


class L0Control:
    """A PI controller of the logarithm of the sparsity weight, on the logarithm of the running L0 over its target.

    Nothing waits for the device that it is on.

    Args:
        target: features active a token.
        turn: by how much of its length a step can turn a feature, lr x sqrt(d_in) under Adam; L0 follows no faster.
        device: of the SAE.
        architecture: of the SAE; where it is jumprelu, L0 comes down to the target evenly in its logarithm.
        n_steps: of the run.
    """

    _STATE = ("integral", "log_l0", "log_first", "n_steps")

    def __init__(self, target: float, turn: float, device: str, architecture: str, n_steps: int) -> None:
        self.target = target
        self._ramp_steps = int(_RAMP[architecture] * n_steps)
        self._rate = _INTEGRAL * turn
        self._integral = torch.full((), math.log(_START[architecture]), dtype=torch.float64, device=device)
        self._log_l0 = torch.full_like(self._integral, math.nan)  # running
        self._log_first = torch.full_like(self._integral, math.nan)
        self._n_steps = torch.zeros_like(self._integral)

    def _error(self) -> torch.Tensor:
        """Of the running L0 against where it is to be by now, in e-folds."""
        target = math.log(self.target)
        share_left = (1 - self._n_steps / self._ramp_steps).clamp(min=0) if self._ramp_steps else 0.0
        due = target + share_left * (self._log_first - target).clamp(min=0).nan_to_num()
        return (self._log_l0 - due).clamp(-1, 1).nan_to_num()

    @property
    def factor(self) -> torch.Tensor:
        """What the weight is multiplied by now."""
        return (self._integral + _PROPORTIONAL * self._error()).exp()

    @property
    def found_factor(self) -> float:
        """What the weight would have been multiplied by from the start, as far as is known by now."""
        return self._integral.exp().item()

    @property
    def l0(self) -> float:
        """The running L0."""
        return self._log_l0.exp().item()

    @property
    def is_near(self) -> bool:
        return abs(self.l0 / self.target - 1) <= NEAR_TARGET

    def update(self, l0: torch.Tensor, pace: float, skip: torch.Tensor) -> None:
        """Takes a step in.

        Args:
            l0: of its batch, [].
            pace: its learning rate, as a share of the full one. The weight slows down with its root: where it kept its
                pace, it would run away from an L0 that cannot follow any more; with the rate itself, it would be late.
            skip: whether it was not applied, [], boolean.
        """
        log_l0 = l0.double().clamp(min=1e-3).log()
        running = torch.where(self._log_l0.isnan(), log_l0, torch.lerp(log_l0, self._log_l0, _MEMORY))
        self._log_l0 = torch.where(skip, self._log_l0, running)
        self._log_first = torch.where(self._log_first.isnan(), self._log_l0, self._log_first)
        self._n_steps = self._n_steps + ~skip
        error = self._error()
        change = math.sqrt(pace) * self._rate * torch.where(error < 0, _DOWN * error, error)
        self._integral = torch.where(skip, self._integral, (self._integral + change).clamp(-_FURTHEST, _FURTHEST))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, f"_{name}") for name in self._STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._STATE:
            setattr(self, f"_{name}", state[name].to(self._integral.device))
