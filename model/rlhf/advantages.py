"""From scores of responses to advantages of tokens (Llama 2, section 3.2.3; Schulman et al. 2016).

Shapes: B responses of a batch, L tokens of the longest, EOS included. `is_token_BL` is True where a response has a
token, which is from its first place on, without gaps; everything else is 0 there and stays so.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8  # added to a variance before its root is divided by


def clamped_log_odds(log_odds: float, largest: float) -> float:
    """Return log-odds of at most `largest` either way: a probability of 0 or 1 has none that are finite."""
    return max(-largest, min(largest, log_odds))


def whiten(values_N: Tensor) -> Tensor:
    """Return values shifted and scaled to mean 0 and variance 1 (Llama 2, section 3.2.3); if all are equal, zeros."""
    centred_N = values_N - values_N.mean()
    return centred_N * torch.rsqrt(centred_N.square().mean() + SMALLEST)


def whiten_groups(values_N: Tensor, groups_N: Tensor) -> Tensor:
    """Return values whitened within each group of equal numbers: what two reward models say has no common scale."""
    whitened_N = torch.zeros_like(values_N)
    for group in torch.unique(groups_N):
        whitened_N[groups_N == group] = whiten(values_N[groups_N == group])
    return whitened_N


def whiten_tokens(values_BL: Tensor, is_token_BL: Tensor) -> Tensor:
    """Return the tokens' values whitened over all tokens of the batch."""
    return torch.zeros_like(values_BL).masked_scatter(is_token_BL, whiten(values_BL[is_token_BL]))


def token_rewards(scores_B: Tensor, log_ratios_BL: Tensor, is_token_BL: Tensor, kl_coefficient: float) -> Tensor:
    """Return each token's reward (B, L): the penalty for leaving the reference, and on the last one the score.

    `log_ratios_BL` are the logarithms of the policy's probabilities over the reference's. A response's rewards sum to
    its score - kl_coefficient * sum of its log-ratios (Llama 2, section 3.2.3, the objective of R).
    """
    rewards_BL = -kl_coefficient * log_ratios_BL * is_token_BL
    lasts_B = is_token_BL.sum(dim=1) - 1
    rewards_BL[torch.arange(len(scores_B)), lasts_B] += scores_B
    return rewards_BL


def estimate_advantages(
    rewards_BL: Tensor, values_BL: Tensor, is_token_BL: Tensor, discount: float, decay: float
) -> Tensor:
    """Return each token's generalised advantage (Schulman et al. 2016, equation 16); `decay` is its lambda.

    `values_BL` are what the value model expects before each token; after the last one there is nothing to expect.
    """
    after_B = torch.zeros(len(rewards_BL))  # the next token's advantage
    expected_B = torch.zeros(len(rewards_BL))  # and its value
    advantages_BL = torch.zeros_like(rewards_BL)
    for place in reversed(range(rewards_BL.shape[1])):
        surprise_B = rewards_BL[:, place] + discount * expected_B - values_BL[:, place]
        is_token_B = is_token_BL[:, place]
        after_B = torch.where(is_token_B, surprise_B + discount * decay * after_B, 0.0)
        expected_B = torch.where(is_token_B, values_BL[:, place], 0.0)
        advantages_BL[:, place] = after_B
    return advantages_BL


def explained_variance(returns_N: Tensor, values_N: Tensor) -> float:
    """Return the share of the returns' variance that the values explain: 1 all, 0 none, below 0 worse than none."""
    variance = float(returns_N.var(correction=0))
    return 1.0 - float((returns_N - values_N).var(correction=0)) / variance if variance > 0 else 0.0
