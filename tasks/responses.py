"""Generate two answers to each prompt of a round, for annotators to choose from (Llama 2, section 3.2.1).

The answers come from two variants, the newest model and an earlier one, each at one of its temperatures, which a hash
of the prompt's id picks, and are shown in random order. Pairs of fluent answers teach reward models what is true, pairs
that differ grossly teach them form. A hash of a prompt's id assigns it to one round, so rounds share no prompts and
adding one changes no other. If both answers are the same, the earlier variant draws again. A prompt without room for an
answer is left out.

Run once for each round (`responses@v1`). Reads both checkpoints, the prompt files, the guidelines.
Writes helpfulness.jsonl and safety.jsonl, and label_studio/<kind>/, a project to label each in (tasks/judging).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint, read_config, read_tokenizer
from model.network.ranks import from_all_ranks, join_ranks
from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.judging.label_studio import batch_of, read_guidelines, write_project
from tasks.reading.prompts import KINDS, Answer, Kind, Prompt, ResponsePair, as_text
from tasks.reading.rounds import Place, round_of
from tasks.reading.shares import Asked, Files, Numbers, at_most, shares_of
from tasks.running.digests import number_of
from tasks.running.files import write_lines
from tasks.running.params import Section
from tasks.running.stage import Stage, start

Temperature = Annotated[float, Field(gt=0)]


class Temperatures(Section):
    """The temperatures at which each variant draws."""

    newest: list[Temperature] = Field(min_length=1, description="of the newest model")
    earlier: list[Temperature] = Field(min_length=1, description="of the earlier model")


class Params(Section):
    """Which prompts are asked, and how the two variants answer."""

    prompts: Files = Field(description="prompt files, divided among all rounds")
    max_prompts: Numbers = Field(description="prompts of the first round")
    later_share: float = Field(gt=0, le=1, description="share of that number that later rounds have, to add to it")
    num_rounds: int = Field(gt=0, description="rounds that share the prompts; a change gives every round other prompts")
    temperatures: Temperatures = Field(description="divide the logits; a prompt is answered at one of each variant's")
    top_p: float = Field(gt=0, le=1, description="draw among the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw among this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of an answer, EOS included")
    max_draws: int = Field(gt=0, description="maximum draws of the earlier variant where both answers are the same")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")
    guidelines: str = Field(min_length=1, description="directory of helpfulness.md and safety.md, for annotators")


class Variant(NamedTuple):
    """A checkpoint and its temperatures."""

    name: Literal["newest", "earlier"]
    model: str
    temperatures: list[float]


def run(stage: Stage[Params]) -> dict[str, float]:
    """Take the round's prompts, let both variants answer, write the pairs."""
    params = stage.params
    place = round_of(stage.name)
    newest, earlier = variants_of(place, params)
    guidelines = read_guidelines(Path(params.guidelines))
    asked = prompts_of(place, params)
    fitting = with_room(with_room(asked, newest), earlier)
    started = time.monotonic()
    pairs = answer_twice(stage, fitting, newest, earlier)
    num_tokens = sum(answer["num_tokens"] for both in pairs for answer in both)
    seconds = time.monotonic() - started
    if pairs:
        stage.log({"tokens_per_second": num_tokens / seconds, "seconds": seconds}, step=0)
    figures: dict[str, float] = {}
    for kind in KINDS:
        own = [number for number, each in enumerate(fitting) if each.kind == kind]
        lines = [
            pair_of(fitting[number], pairs[number], place.name, stage.seed)
            for number in own
            if pairs[number][0]["text"] != pairs[number][1]["text"]
        ]
        batch = batch_of(place.name, kind, lines)
        for line in lines:
            line["batch"] = batch
        if stage.rank == 0:
            write_pairs(stage, kind, lines, guidelines[kind])
        figures |= {
            f"{kind}/prompts": sum(each.kind == kind for each in asked),
            f"{kind}/too_long": sum(each.kind == kind for each in asked) - len(own),
            f"{kind}/identical": len(own) - len(lines),
            f"{kind}/pairs": len(lines),
        }
    for number, variant in enumerate((newest, earlier)):
        answers = [both[number] for both in pairs]
        if answers:
            figures[f"{variant.name}/answer_tokens"] = sum(answer["num_tokens"] for answer in answers) / len(answers)
            figures[f"{variant.name}/finished"] = sum(answer["finished"] for answer in answers) / len(answers)
    return figures


def variants_of(place: Place, params: Params) -> tuple[Variant, Variant]:
    """Return the two variants of a round. Raises ValueError when they are the same model."""
    newest, earlier = place.round.newest, place.round.earlier
    if Path(newest) == Path(earlier):
        raise ValueError(
            f"params.yaml: `rounds.{place.name}.newest` and `.earlier` are both {newest}: name an earlier checkpoint, "
            "or each pair compares a model with itself"
        )
    return (
        Variant("newest", newest, params.temperatures.newest),
        Variant("earlier", earlier, params.temperatures.earlier),
    )


def prompts_of(place: Place, params: Params) -> list[Asked]:
    """Return the round's prompts of all kinds, in their files' order. Raises ValueError as `shares_of` does."""
    shares = shares_of(place, params.prompts, params.max_prompts, params.num_rounds, "responses")
    share = params.later_share if place.number else 1.0
    limits = {kind: math.ceil(share * getattr(params.max_prompts, kind)) for kind in KINDS}
    return [Asked(kind, prompt) for kind in KINDS for prompt in at_most(shares[kind], limits[kind])]


def with_room(asked: Sequence[Asked], variant: Variant) -> list[Asked]:
    """Return the prompts that leave room for an answer in a variant's context."""
    if not asked:
        return []
    config = read_config(Path(variant.model))
    tokenizer = read_tokenizer(Path(variant.model), config)
    context = config.max_position_embeddings
    return [each for each in asked if len(encode_prompt(each.prompt.messages, tokenizer)) < context]


def answer_twice(
    stage: Stage[Params], asked: Sequence[Asked], newest: Variant, earlier: Variant
) -> list[tuple[Answer, Answer]]:
    """Return both variants' answers to each prompt, with one model at a time in memory."""
    if not asked:
        return []
    prompts = [each.prompt for each in asked]
    device = join_ranks()
    precision = stage.params.precision
    first = answers_of(stage, newest, *open_checkpoint(Path(newest.model), precision, device), prompts, draw=0)
    model, tokenizer = open_checkpoint(Path(earlier.model), precision, device)
    second = answers_of(stage, earlier, model, tokenizer, prompts, draw=0)
    for draw in range(1, stage.params.max_draws):
        same = [number for number in range(len(prompts)) if first[number]["text"] == second[number]["text"]]
        if not same:
            break
        again = answers_of(stage, earlier, model, tokenizer, [prompts[number] for number in same], draw)
        for number, answer in zip(same, again, strict=True):
            second[number] = answer
    return list(zip(first, second, strict=True))


def answers_of(
    stage: Stage[Params], variant: Variant, model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt], draw: int
) -> list[Answer]:
    """Return a variant's answer to each prompt; the ranks share the prompts, and each gets all answers."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    params = stage.params
    answers: dict[int, Answer] = {}
    for temperature in sorted(set(variant.temperatures)):
        own = [
            number
            for number in range(rank, len(prompts), world)
            if temperature_of(variant, prompts[number]) == temperature
        ]
        responses = sample(
            model,
            [encode_prompt(prompts[number].messages, tokenizer) for number in own],
            Sampling(
                temperature=temperature, top_p=params.top_p, top_k=params.top_k, max_new_tokens=params.max_new_tokens
            ),
            num_samples=1,
            eos_id=tokenizer.eos_id,
            seeds=[number_of(f"{stage.seed} {variant.name} {draw} {prompts[number].id}") for number in own],
            max_rows=params.max_rows,
            description=f"{stage.name} {variant.name}, temperature {temperature}" if rank == 0 else None,
        )
        for number, (response,) in zip(own, responses, strict=True):
            answers[number] = Answer(
                text=decode_answer(response.ids, tokenizer),
                finished=response.finished,
                num_tokens=len(response.ids),
                responder={"model": variant.model, "temperature": temperature},
            )
    return from_all_ranks(answers)


def temperature_of(variant: Variant, prompt: Prompt) -> float:
    """Return the temperature at which a variant answers a prompt."""
    return variant.temperatures[number_of(f"{variant.name} temperature {prompt.id}") % len(variant.temperatures)]


def pair_of(asked: Asked, answers: Sequence[Answer], round_name: str, seed: int) -> ResponsePair:
    """Return a prompt with its answers in the order shown, which a hash of seed and prompt decides."""
    prompt = asked.prompt
    swap = number_of(f"{seed} order {prompt.id}") % 2
    return {
        "id": prompt.id,
        "kind": asked.kind,
        "messages": prompt.messages,
        "category": prompt.category,
        "risk": prompt.risk,
        "attack": prompt.attack,
        "responses": list(reversed(answers) if swap else answers),
        "round": round_name,
        "batch": "",
    }


def write_pairs(stage: Stage[Params], kind: Kind, pairs: Sequence[ResponsePair], guideline: str) -> None:
    """Write a batch, the project to label it in, and a table to look at."""
    import pandas

    write_lines(stage.output / f"{kind}.jsonl", pairs)
    if not pairs:
        return
    write_project(stage.output / "label_studio" / kind, kind, guideline, pairs)
    rows = [
        {
            "id": pair["id"],
            "category": pair["category"],
            "prompt": as_text(pair["messages"]),
            **{response["responder"]["model"]: response["text"] for response in pair["responses"]},
        }
        for pair in pairs
    ]
    pandas.DataFrame(rows).to_csv(stage.tables / f"{kind}.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
