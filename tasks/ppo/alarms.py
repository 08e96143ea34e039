"""What tells that PPO goes wrong: an audit of each iteration's samples, before anything is learnt from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from tasks.running.params import Section


class Alarms(Section):
    """Limits; beyond one of them, the stage stops."""

    max_kl: float = Field(gt=0, description="maximum KL from the starting policy, nats per response")
    min_entropy: float = Field(ge=0, description="minimum entropy of the policy, nats per token")
    max_length_ratio: float = Field(gt=1, description="maximum factor by which responses grow or shrink on average")


def check_alarms(
    alarms: Alarms, step: int, seen: Mapping[str, float], first_length: float, kept: tuple[int, Path]
) -> None:
    """Raise ValueError, saying what was seen, when an iteration's samples are beyond a limit.

    `seen` has `kl`, `entropy`, `length` and `empty`, the share of empty responses; `first_length` is the length of the
    first iteration's. `kept` is the last good policy: its iteration and its directory.
    """
    ratio = seen["length"] / first_length
    wrong = []
    if seen["kl"] > alarms.max_kl:
        wrong.append(
            f"the KL from the starting policy is {seen['kl']:.2f} nats a response, above `ppo.alarms.max_kl` "
            f"{alarms.max_kl:g}"
        )
    if seen["entropy"] < alarms.min_entropy:
        wrong.append(
            f"the entropy is {seen['entropy']:.3f} nats a token, below `ppo.alarms.min_entropy` {alarms.min_entropy:g}"
        )
    if max(ratio, 1 / ratio) > alarms.max_length_ratio:
        wrong.append(
            f"responses have {seen['length']:.1f} tokens, where the first had {first_length:.1f}, beyond "
            f"`ppo.alarms.max_length_ratio` {alarms.max_length_ratio:g}"
        )
    if seen["empty"] == 1:
        wrong.append("every response is empty")
    if wrong:
        good, directory = kept
        raise ValueError(
            f"iteration {step + 1}: {'; '.join(wrong)}. The policy may be over-optimised: raise `ppo.kl_coefficient` "
            f"or lower `ppo.learning_rate`, and look at the samples. The last policy that was validated, of iteration "
            f"{good}, is kept in {directory}; `ppo.num_iterations` {good} would end with it"
        )
