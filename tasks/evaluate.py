"""Answer the evaluation's prompts with one checkpoint, and judge the answers (Llama 2, sections 3.4 and 4.4).

Answers are greedy, so that checkpoints differ by their weights and not by luck. In the default world each answer is
judged by the known truth: whether it is right, is safe, does as the system message asked, or refuses where no refusal
was due. Elsewhere there is no truth, and only what can be told of any answer is reported. Shares are of all prompts of
their kind, with Wilson's interval; a prompt that is too long for the model counts as unanswered.

Run once for each checkpoint (`evaluate@sft`). Reads the checkpoint, the prompt files, data/world/truth.
Writes answers.jsonl and plots/shares.csv; for MLflow also the tables of answers and of shares.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint
from model.network.ranks import from_all_ranks, join_ranks
from model.network.transformer import Llama
from model.sampling.sampler import Response, Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.judging.intervals import wilson
from tasks.reading.prompts import Prompt, as_text, read_prompts
from tasks.running.files import write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.world.judge import Judgement, Truth, judge, read_truth

HEADLINES = (
    "well_formed",
    "factual/held_out/right",
    "safety/violations",
    "borderline/false_refusals",
    "instruction/followed",
)


class Params(Section):
    """Which checkpoints answer which prompts, and how."""

    checkpoints: dict[str, str] = Field(
        min_length=1, description="Hugging Face Llama directory of each checkpoint, by the name of its evaluation"
    )
    root: str = Field(min_length=1, description="directory of the prompt files, which DVC watches")
    prompts: list[str] = Field(min_length=1, description="prompt files below `root`, JSON lines")
    truth: str | None = Field(description="directory of what the judge knows; null: answers are not judged")
    sampling: Sampling = Field(description="how answers are drawn; temperature 0: always the likeliest token")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")


class Answer(NamedTuple):
    """What a checkpoint answered; without tokens if the prompt left no room in the context."""

    text: str
    num_tokens: int
    finished: bool


class Judged(NamedTuple):
    """A prompt, its answer, and what the truth says of them; `held_out`: it asks for a fact of a held-out entity."""

    prompt: Prompt
    answer: Answer
    judgement: Judgement | None
    held_out: bool


class Share(NamedTuple):
    """How many of how many prompts, and the share with its 95% interval."""

    hits: int
    prompts: int
    share: float
    low: float
    high: float


def run(stage: Stage[Params]) -> dict[str, float]:
    """Answer, judge, report."""
    params = stage.params
    checkpoint = checkpoint_of(stage)
    prompts = read_prompts([Path(params.root) / name for name in params.prompts], "evaluate.prompts")
    truth = None if params.truth is None else read_truth(Path(params.truth))
    device = join_ranks()
    model, tokenizer = open_checkpoint(checkpoint, params.precision, device)
    started = time.monotonic()
    answers = answer_all(stage, model, tokenizer, prompts)
    seconds = time.monotonic() - started
    num_tokens = sum(answer.num_tokens for answer in answers)
    stage.log({"tokens_per_second": num_tokens / seconds, "seconds": seconds}, step=0)
    judged = [judge_answer(prompt, answer, truth) for prompt, answer in zip(prompts, answers, strict=True)]
    shares = shares_of(outcomes_of(each) for each in judged)
    if stage.rank == 0:
        write_answers(stage, judged)
        write_shares(stage, shares)
    return {
        "prompts": len(prompts),
        "prompts_too_long": sum(answer.num_tokens == 0 for answer in answers),
        "answer_tokens": num_tokens / len(prompts),
        **figures_of(shares),
    }


def checkpoint_of(stage: Stage[Params]) -> Path:
    """Return the checkpoint that this run of the stage evaluates.

    Raises ValueError when params.yaml has no checkpoint of that name.
    """
    item = stage.entry
    known = stage.params.checkpoints
    if item not in known:
        names = ", ".join(f"evaluate@{name}" for name in known)
        raise ValueError(f"`evaluate.checkpoints` has no `{item}`: evaluate one of {names}")
    return Path(known[item])


# --- answers ---


def answer_all(stage: Stage[Params], model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[Answer]:
    """Return the answer to each prompt; the ranks share the prompts, and each gets all answers."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    context = model.config.max_position_embeddings
    encoded = {
        number: encode_prompt(prompts[number].messages, tokenizer) for number in range(rank, len(prompts), world)
    }
    fitting = [number for number, ids in encoded.items() if len(ids) < context]
    responses = sample(
        model,
        [encoded[number] for number in fitting],
        stage.params.sampling,
        num_samples=1,
        eos_id=tokenizer.eos_id,
        seeds=[stage.seed + number for number in fitting],
        max_rows=stage.params.max_rows,
        description=stage.name if rank == 0 else None,
    )
    own = {number: Answer("", 0, finished=False) for number in encoded}
    own |= {number: answer_of(response, tokenizer) for number, (response,) in zip(fitting, responses, strict=True)}
    return from_all_ranks(own)


def answer_of(response: Response, tokenizer: Tokenizer) -> Answer:
    """Return a response as text."""
    return Answer(decode_answer(response.ids, tokenizer), len(response.ids), response.finished)


# --- figures ---


def judge_answer(prompt: Prompt, answer: Answer, truth: Truth | None) -> Judged:
    """Judge an answer, if there is a truth to judge it against."""
    if truth is None:
        return Judged(prompt, answer, None, held_out=False)
    judgement = judge(truth, prompt.id, answer.text, answer.finished)
    return Judged(prompt, answer, judgement, truth.prompts[prompt.id].held_out)


def outcomes_of(judged: Judged) -> dict[str, bool]:
    """Return the figures that one answer counts for, and whether it is a hit in each."""
    prompt, answer, judgement, held_out = judged
    category = metric_name(prompt.category)
    if judgement is None:
        well_formed = answer.finished and bool(answer.text)
        return {"well_formed": well_formed, f"{category}/well_formed": well_formed}
    found = {"well_formed": judgement.well_formed, f"{category}/well_formed": judgement.well_formed}
    if judgement.right is not None:
        found[f"{category}/right"] = judgement.right
        if category == "factual":
            found[f"factual/{'held_out' if held_out else 'known'}/right"] = judgement.right
    if judgement.follows is not None:
        found[f"{category}/followed"] = judgement.follows
    if category != "safety":
        found[f"{category}/false_refusals"] = judgement.refuses
        return found
    found["safety/refused"] = judgement.refuses
    found["safety/violations"] = not judgement.safe
    for kind, value in (("risk", prompt.risk), ("attack", prompt.attack)):
        if value is not None:
            found[metric_name("safety", kind, value, "violations")] = not judgement.safe
    return found


def shares_of(outcomes: Iterable[Mapping[str, bool]]) -> dict[str, Share]:
    """Return each figure's share, by name, the headlines first."""
    found: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for name, hit in outcome.items():
            found[name].append(hit)
    shares = {}
    for name in sorted(found, key=lambda name: (name not in HEADLINES, name)):
        hits, prompts = sum(found[name]), len(found[name])
        shares[name] = Share(hits, prompts, hits / prompts, *wilson(hits, prompts))
    return shares


def figures_of(shares: Mapping[str, Share]) -> dict[str, float]:
    """Return the shares as metrics, the headlines with their intervals."""
    figures = {}
    for name, share in shares.items():
        figures[name] = share.share
        if name in HEADLINES:
            figures |= {f"{name}/low": share.low, f"{name}/high": share.high}
    return figures


# --- files ---


def write_answers(stage: Stage[Params], judged: Sequence[Judged]) -> None:
    """Write each prompt with its answer and the judgement, as JSON lines and as a table."""
    import pandas

    lines, table = [], []
    for prompt, answer, judgement, _ in judged:
        found = {} if judgement is None else asdict(judgement)
        row = {"id": prompt.id, "category": prompt.category, "risk": prompt.risk, "attack": prompt.attack}
        replied = {"answer": answer.text, "num_tokens": answer.num_tokens, "finished": answer.finished}
        lines.append({**row, "messages": prompt.messages, **replied, "judgement": found or None})
        table.append({**row, "prompt": as_text(prompt.messages), **replied, **found})
    write_lines(stage.output / "answers.jsonl", lines)
    pandas.DataFrame(table).to_csv(stage.tables / "answers.csv", index=False)


def write_shares(stage: Stage[Params], shares: Mapping[str, Share]) -> None:
    """Write the shares as a plot and as a table."""
    import pandas

    table = pandas.DataFrame({"figure": name, **share._asdict()} for name, share in shares.items())
    kinds = "share of the prompts of their kind"
    stage.plot("shares", table, Plot("bars", "Answers by their judgements", "share", "figure", kinds, "figure"))
    table.to_csv(stage.tables / "shares.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
