"""A step of Adam with clipped gradients by PyTorch's fused kernel, which can skip the step without asking the host."""

from __future__ import annotations

import torch


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Has Adam use the fused kernel from the next step on, and lays out the moments that it has as the kernel needs."""
    for group in optimizer.param_groups:
        group["fused"] = _can_fuse(optimizer)
    for parameter, state in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moment = state[name]
            if moment.device != parameter.device or moment.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(moment)


def clip_and_step(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor, not_finite: torch.Tensor) -> None:
    """Clips the gradients to norm 1 and takes a step of Adam. It waits for the device on mps only.

    Args:
        optimizer: Adam, after `fuse`.
        grad_norm: norm of all gradients, [].
        not_finite: whether to leave the weights as they are, [].
    """
    _clip(optimizer, grad_norm)
    _lay_out_gradients(optimizer)
    if _can_fuse(optimizer):
        # As under torch's GradScaler: the kernel skips the step where this is not 0.
        optimizer.found_inf = not_finite.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not not_finite.item():
        optimizer.step()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _can_fuse(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the fused kernel is used. That of mps does not skip steps that are not finite."""
    return _parameters(optimizer)[0].device.type != "mps"


def _clips_in_kernel(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the kernel divides gradients by their norm while it reads them. It takes the norm in float32."""
    weights = _parameters(optimizer)
    return all(weight.device.type == "cuda" and weight.dtype == torch.float32 for weight in weights)


def _clip(optimizer: torch.optim.Optimizer, grad_norm: torch.Tensor) -> None:
    if _clips_in_kernel(optimizer):
        # Also an attribute of the GradScaler's; 1e-6 as in clip_grads_with_norm_.
        optimizer.grad_scale = (grad_norm + 1e-6).clamp(min=1.0).float()  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grads_with_norm_(_parameters(optimizer), 1.0, grad_norm)


def _lay_out_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Views column-major gradients, such as that of `sparse_topk`'s W_enc, as row-major ones. This saves a copy.

    The fused kernel of a CPU goes through the memory of weight and gradient in order, so they still match. It would
    make a row-major copy of a column-major gradient, and then not use that copy.
    """
    for weight in _parameters(optimizer):
        grad = weight.grad
        if grad is None or grad.ndim != 2 or grad.device.type != "cpu":
            continue
        if grad.t().is_contiguous() and weight.t().is_contiguous():
            weight.grad = grad.t().view(grad.shape)
