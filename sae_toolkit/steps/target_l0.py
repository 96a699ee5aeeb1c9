"""Adjusts the sparsity weight during training until L0 reaches a target, for SAEs that have no setting for L0."""

from __future__ import annotations

import math
from typing import Any

import torch

NEAR_TARGET = 0.1  # how far an L0 may be from the target, as a share of the target
# The settings that SAELens recommends for JumpReLU (its guide to training), with gradients to the encoder as in
# Anthropic's setup. With SAELens's defaults, thresholds start at 0.01 and move by at most the learning rate in a step.
JUMPRELU = {
    "jumprelu_sparsity_loss_mode": "tanh",
    "jumprelu_bandwidth": 2.0,
    "jumprelu_init_threshold": 0.1,
    "jumprelu_ste_to_input": True,
    "pre_act_loss_coefficient": 3e-6,
}

# _START is the factor of the given weight at the start. _RAMP is the share of the run over which L0 comes down to the
# target. A weight that is too large kills features for good, most easily in a JumpReLU SAE: with a factor of 0.1 and no
# ramp 36% of its features were dead at the end, and with these numbers 0.5% (2,304 features, 488 steps).
_START = {"standard": 0.1, "gated": 0.1, "jumprelu": 0.003}
_RAMP = {"standard": 0.0, "gated": 0.0, "jumprelu": 0.8}
# The next constants were chosen by runs of 480 and 1,000 steps of standard and gated SAEs on real activations, with
# starting weights from a twentieth of the right one to fifty times the right one.
_FURTHEST = math.log(1000)  # limit of the logarithm of the factor, in either direction
_MEMORY = 0.9  # share of the running L0 that a step keeps
# In a run that is shorter than _LONG steps by some factor, the controller is faster by that factor, up to _HASTE.
# Chosen by runs of 100 steps, in which L0 otherwise ends far above the target.
_LONG, _HASTE = 250, 5.0
_PROPORTIONAL = 0.5
_INTEGRAL = 0.6  # what an error of 1 adds over 1 / turn steps, in which a feature can turn by its whole length
_DOWN = 3.0  # how much faster the weight falls than it rises: features die while L0 is too low


class L0Control:
    """A PI controller of the logarithm of the sparsity weight. Its error is the logarithm of the running L0 / target.

    Its state is on the SAE's device. `factor` and `update` do not wait for that device.

    Args:
        target: wanted number of active features of a token.
        turn: how far a step can turn a feature, as a share of its length: lr x sqrt(d_in) under Adam. L0 cannot follow
            the weight faster than that.
        device: device of the SAE.
        architecture: architecture of the SAE. For jumprelu the logarithm of L0 comes down to the target linearly.
        n_steps: number of steps of the run.
    """

    _STATE = ("integral", "log_l0", "log_first", "n_steps")

    def __init__(self, target: float, turn: float, device: str, architecture: str, n_steps: int) -> None:
        self.target = target
        self._ramp_steps = int(_RAMP[architecture] * n_steps)
        self._turn = turn
        self._set_speed(min(max(1.0, _LONG / n_steps), _HASTE))
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64  # mps has no float64
        self._integral = torch.full((), math.log(_START[architecture]), dtype=dtype, device=device)
        self._log_l0 = torch.full_like(self._integral, math.nan)  # of the running L0
        self._log_first = torch.full_like(self._integral, math.nan)
        self._n_steps = torch.zeros_like(self._integral)

    def begin_with_given_weight(self) -> None:
        """Begins with the given weight, and with the target from the first step on. For an SAE that is trained already.

        Call it before a state is loaded.
        """
        self._integral.zero_()
        self._ramp_steps = 0
        self._set_speed(1.0)

    def _set_speed(self, haste: float) -> None:
        self._rate = _INTEGRAL * self._turn * haste
        self._memory = 1 - (1 - _MEMORY) * haste

    def _error(self) -> torch.Tensor:
        """Returns log(running L0 / L0 that is wanted at this step), clipped to [-1, 1]."""
        target = math.log(self.target)
        share_left = (1 - self._n_steps / self._ramp_steps).clamp(min=0) if self._ramp_steps else 0.0
        due = target + share_left * (self._log_first - target).clamp(min=0).nan_to_num()
        return (self._log_l0 - due).clamp(-1, 1).nan_to_num()

    @property
    def factor(self) -> torch.Tensor:
        """The current factor of the weight."""
        return (self._integral + _PROPORTIONAL * self._error()).exp()

    @property
    def found_factor(self) -> float:
        """The estimate so far of the constant factor that leads to the target."""
        return self._integral.exp().item()

    @property
    def l0(self) -> float:
        """The running L0."""
        return self._log_l0.exp().item()

    @property
    def is_near(self) -> bool:
        """Whether the running L0 is within `NEAR_TARGET` of the target."""
        return abs(self.l0 / self.target - 1) <= NEAR_TARGET

    def update(self, l0: torch.Tensor, pace: float, skip: torch.Tensor) -> None:
        """Updates the factor after a training step.

        Args:
            l0: the L0 of the step's batch, [].
            pace: the step's learning rate, as a share of the full one. The factor changes in proportion to its square
                root. If it kept its full speed, L0 could no longer follow and the factor would overshoot; in proportion
                to the rate itself it would come too late.
            skip: whether the step was not applied, [], boolean.
        """
        log_l0 = l0.to(self._integral.dtype).clamp(min=1e-3).log()
        running = torch.where(self._log_l0.isnan(), log_l0, torch.lerp(log_l0, self._log_l0, self._memory))
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
            setattr(self, f"_{name}", state[name].to(self._integral))
