"""What a policy and its value model learn from sampled tokens (Schulman et al. 2017), and how far two models are apart.

Shapes: T tokens, whatever their order; where there is nothing to learn, all arguments are 0 and so is the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_losses(log_probabilities_T: Tensor, sampled_T: Tensor, advantages_T: Tensor, clip: float) -> Tensor:
    """Return each token's clipped loss (Schulman et al. 2017, equation 7).

    `sampled_T` are the log-probabilities under the policy that sampled. Once a ratio has gained more than `clip` in the
    direction that its advantage asks for, its gradient is 0.
    """
    ratios_T = (log_probabilities_T - sampled_T).exp()
    return torch.maximum(-advantages_T * ratios_T, -advantages_T * ratios_T.clamp(1 - clip, 1 + clip))


def value_losses(values_T: Tensor, before_T: Tensor, returns_T: Tensor, clip: float) -> Tensor:
    """Return each token's squared error, halved; the worse one of the value and of the value clipped.

    The clipped value is at most `clip` from the one before the update, as in the reference implementation of PPO.
    """
    clipped_T = before_T + (values_T - before_T).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_T - returns_T).square(), (clipped_T - returns_T).square())


def is_clipped(log_probabilities_T: Tensor, sampled_T: Tensor, advantages_T: Tensor, clip: float) -> Tensor:
    """Return whether each token's policy loss is clipped: it then has no gradient."""
    ratios_T = (log_probabilities_T - sampled_T).exp()
    return torch.where(advantages_T > 0, ratios_T > 1 + clip, (ratios_T < 1 - clip) & (advantages_T < 0))


def kl_k1(log_probabilities_T: Tensor, reference_T: Tensor) -> Tensor:
    """Return each sampled token's log-ratio: its mean is an unbiased KL(policy || reference) (Schulman 2020)."""
    return log_probabilities_T - reference_T


def kl_k3(log_probabilities_T: Tensor, reference_T: Tensor) -> Tensor:
    """Return each sampled token's r - 1 - log r, r = reference / policy: also unbiased, never negative (Schulman 2020).

    Its gradient pulls towards the reference by 1 - r; where r is 1, both are 0.
    """
    log_r_T = reference_T - log_probabilities_T
    return log_r_T.exp() - 1 - log_r_T
