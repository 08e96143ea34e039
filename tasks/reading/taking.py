"""The prompts that a round's stage samples answers to: its share, without what the evaluation asks, some set apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from model.text.dialogue import encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.reading.contamination import EvaluationPrompts, asks_the_same
from tasks.reading.prompts import Kind, Prompt
from tasks.reading.rounds import Place
from tasks.reading.shares import Files, Numbers, at_most, shares_of
from tasks.running.params import Section


class Asking(Section):
    """Where a stage's prompts come from, and how many it takes."""

    prompts: Files = Field(description="prompt files, divided among all rounds")
    max_prompts: Numbers = Field(description="prompts of one round")
    num_rounds: int = Field(gt=0, description="rounds that share the prompts; a change gives every round other prompts")


class TakenPrompts(NamedTuple):
    """A round's prompts of one kind."""

    apart: list[Prompt]  # nothing is trained on them
    prompts: list[Prompt]
    num_evaluation: int  # left out: the evaluation asks the same
    too_long: list[Prompt]  # left out: no room for an answer


def take_prompts(
    place: Place,
    section: str,
    params: Asking,
    num_apart: Numbers,
    tokenizer: Tokenizer,
    context: int,
    evaluation: EvaluationPrompts,
) -> dict[Kind, TakenPrompts]:
    """Return the round's prompts of each kind, and those set apart, which are others.

    Raises ValueError as `shares_of` does, and for a kind of which no prompt is left.
    """
    shares = shares_of(place, params.prompts, params.max_prompts, params.num_rounds, section)
    taken = {}
    for kind, share in shares.items():
        limit = getattr(params.max_prompts, kind)
        found = divide(share, getattr(num_apart, kind), tokenizer, context, evaluation)
        taken[kind] = found._replace(prompts=at_most(found.prompts, limit))
        if limit and not found.prompts:
            raise ValueError(
                f"no {kind} prompt is left: of the {len(share)} that are round {place.name}'s, {found.num_evaluation} "
                f"ask what the evaluation asks, {len(found.too_long)} leave no room for an answer in the models' "
                f"context of {context} tokens, and {len(found.apart)} are set apart: bring more in "
                f"`{section}.prompts.{kind}`, or shorter ones"
            )
    return taken


def divide(
    share: Sequence[Prompt], num_apart: int, tokenizer: Tokenizer, context: int, evaluation: EvaluationPrompts
) -> TakenPrompts:
    """Return which prompts of a round's share are set apart, all that are left, and what is left out.

    Two stages that set the same number apart of the same share set the same prompts apart.
    """
    own = [prompt for prompt in share if not asks_the_same(prompt.messages, evaluation)]
    lengths = {prompt.id: len(encode_prompt(prompt.messages, tokenizer)) for prompt in own}
    fitting = [prompt for prompt in own if lengths[prompt.id] < context]
    apart = at_most(fitting, num_apart, "search")
    ids = {prompt.id for prompt in apart}
    rest = [prompt for prompt in fitting if prompt.id not in ids]
    too_long = [prompt for prompt in own if lengths[prompt.id] >= context]
    return TakenPrompts(apart, rest, len(share) - len(own), too_long)
