"""AdamW's direction (Loshchilov and Hutter, arXiv 1711.05101) as a pure function of tensors.

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    direction = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + epsilon)

The weight itself does not appear: for a low-bit weight it exists only as a code, and landing on the grid is the rounding's
business (`lowbit/update.py`). Decoupled weight decay acts there too.
"""

from __future__ import annotations

from torch import Tensor


def adamw_direction(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int, beta1: float, beta2: float, epsilon: float
) -> Tensor:
    """Updates both moments in place (fp32, shape of `gradient`) and returns the direction, fp32.

    `step` counts from 1. The arithmetic is torch.optim.AdamW's; only the learning rate is left to the caller.
    """
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(epsilon)
    return exp_avg / denominator / (1 - beta1**step)
