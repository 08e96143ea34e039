"""Draw safer answers with safety pre-prompts, to be learnt without them (Llama 2, section 4.2.4, Context Distillation).

The newest chat model answers each adversarial prompt of the round once as it is, and several times with a pre-prompt
before it: a system message made from adjectives, half of the time with a template of what an answer to the prompt's
category of risk should say. Every answer is scored as one to the prompt without the pre-prompt, as that is what will be
learnt. Of the pre-prompted answers that can be chosen (tasks/sampling/choosing.py) the safety model's favourite is kept
if that model scores it above the plain answer; without the `gate` always. The dialogues that earlier rounds kept stay,
except that of a prompt that is distilled again. Where there is a truth, the judge tells what it is worth; it decides
nothing.

Prompts that name no risk are never distilled: it would make answers vague. Nor are those that rejection sampling and
PPO set apart, nor those that the evaluation asks. A prompt that leaves no room for an answer in the context, with its
pre-prompts or without, is left out and listed, never cut.

Run once for each entry of `context_distillation.rounds` (`context_distillation@v2`). Reads the newest checkpoint, both
reward models, the prompt file, the pre-prompts, the earlier dialogues, the evaluation's prompts, the truth.
Writes dialogues.jsonl (prompts without pre-prompts, with the answers kept, of all rounds so far), samples.jsonl (every
prompt of the round with all its answers), ungated/dialogues.jsonl (what would be kept without the gate, for a control),
too_long.jsonl, plots/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from model.network.ranks import join_ranks
from model.text.dialogue import encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.context_distillation.preprompts import (
    Preprompt,
    check_risks,
    draw_preprompts,
    read_preprompts,
    with_preprompt,
)
from tasks.context_distillation.reporting import Distilled, report, report_truth
from tasks.judging.calibration import Line
from tasks.judging.scales import Fitted, fit_lines
from tasks.reading.contamination import read_evaluation
from tasks.reading.prompts import Prompt
from tasks.reading.rounds import Joining, Place, entry_at, round_of
from tasks.reading.shares import at_most, read_share
from tasks.reading.taking import TakenPrompts, divide
from tasks.running.files import write_lines
from tasks.running.places import NOTHING
from tasks.running.stage import Stage, start
from tasks.sampling.choosing import can_be_chosen, merged, read_kept
from tasks.sampling.drawing import Candidate, Job, check_models, draw_and_score
from tasks.sampling.params import Drawn, settings_of
from tasks.world.annotators import read_annotators
from tasks.world.judge import read_truth

SECTION = "context_distillation"


class Params(Drawn):
    """Which prompts are asked with which pre-prompts, how answers are drawn, and which are kept."""

    rounds: dict[str, Joining] = Field(description="the rounds that have a distillation, and what it starts from")
    prompts: str = Field(min_length=1, description="JSON lines of adversarial prompts, divided among all rounds")
    max_prompts: int = Field(gt=0, description="prompts of one round")
    num_held_out_prompts: int = Field(ge=0, description="further ones, which are left to be tried on")
    num_rounds: int = Field(gt=0, description="rounds that share the prompts; a change gives every round other prompts")
    preprompts: str = Field(min_length=1, description="TOML file of adjectives, frames and templates")
    num_preprompts: int = Field(gt=0, description="pre-prompts of a prompt")
    template_share: float = Field(ge=0, le=1, description="share of them with the template of the prompt's risk")
    num_samples: int = Field(gt=0, description="answers to a prompt with one of its pre-prompts")
    gate: bool = Field(description="keep an answer only if its safety reward is above the plain answer's")
    temperature: float = Field(gt=0, description="at which all answers are drawn")
    truth: str | None = Field(description="directory of what the judge knows, for the report; null: none")


class Asked(NamedTuple):
    """A prompt and its pre-prompts."""

    prompt: Prompt
    preprompts: list[Preprompt]

    @property
    def preprompted(self) -> list[Prompt]:
        """The prompt with each of its pre-prompts; the ids give each of them random numbers of its own."""
        return [
            self.prompt._replace(
                id=f"{self.prompt.id} {number}", messages=with_preprompt(self.prompt.messages, preprompt.text)
            )
            for number, preprompt in enumerate(self.preprompts)
        ]


class Taken(NamedTuple):
    """What a round asks, and what is left out."""

    asked: list[Asked]
    too_long: list[dict[str, Any]]
    num_without_risk: int
    num_evaluation: int


def run(stage: Stage[Params]) -> dict[str, float]:
    """Draw, choose, report."""
    params, place = stage.params, round_of(stage.name)
    entry = entry_at(place, params.rounds, SECTION)
    earlier = read_earlier(Path(entry.earlier), place.name)
    join_ranks()
    settings = settings_of(params, Path(entry.newest), place.name, stage.seed, stage.scratch)
    taken = take(stage, place, *check_models(settings))
    fitted = fit_lines(place.name)
    description = stage.name if stage.rank == 0 else None
    drawn = draw_and_score(settings, jobs_of(params, taken.asked), {}, description)
    distilled = distill(params, taken.asked, drawn, fitted.safety)
    if all(each.best is None for each in distilled):
        raise ValueError(
            f"none of the {len(distilled)} prompts has a pre-prompted answer that can be chosen: all are empty, or cut "
            f"at `{SECTION}.max_new_tokens` {params.max_new_tokens} or the context's end: raise it, or look at the "
            "chat model's answers"
        )
    new = [dialogue_of(each, place.name) for each in distilled if each.is_kept]
    dialogues = merged(earlier, new)
    ungated = merged(earlier, [dialogue_of(each, place.name) for each in distilled if each.best is not None])
    figures: dict[str, float] = {
        "dialogues": len(dialogues),
        "dialogues_earlier": len(earlier),
        "without_risk": taken.num_without_risk,
        "evaluation_prompts": taken.num_evaluation,
        "too_long": len(taken.too_long),
    }
    if stage.rank == 0:
        write_lines(stage.output / "dialogues.jsonl", dialogues)
        (stage.output / "ungated").mkdir()
        write_lines(stage.output / "ungated" / "dialogues.jsonl", ungated)
        write_lines(
            stage.output / "samples.jsonl", (sample_line(each, place.name, entry.newest, fitted) for each in distilled)
        )
        write_lines(stage.output / "too_long.jsonl", taken.too_long)
        figures |= report(stage, distilled, fitted)
        if params.truth is not None:
            figures |= report_truth(stage, distilled, read_truth(Path(params.truth)), read_annotators())
    return figures


def read_earlier(directory: Path, round_name: str) -> list[dict[str, Any]]:
    """Return what earlier rounds kept, nothing for data/seeds/none. Raises ValueError as `read_kept` does."""
    if directory == NOTHING:
        return []
    return read_kept(directory / "dialogues.jsonl", f"{SECTION}.rounds.{round_name}.earlier", SECTION)


# --- prompts ---


def take(stage: Stage[Params], place: Place, tokenizer: Tokenizer, context: int) -> Taken:
    """Return the round's prompts with their pre-prompts.

    Raises ValueError when none is left, as `read_share` and `read_preprompts` do, and for a risk without a template.
    """
    params, path = stage.params, Path(stage.params.preprompts)
    preprompts = read_preprompts(path)
    share = read_share(place, Path(params.prompts), params.num_rounds, SECTION, "prompts")
    found = divide(share, params.num_held_out_prompts, tokenizer, context, read_evaluation())
    adversarial = [prompt for prompt in found.prompts if prompt.risk]
    check_risks(preprompts, adversarial, path)
    fitting, too_long = [], [too_long_line(prompt, prompt, tokenizer) for prompt in found.too_long if prompt.risk]
    for prompt in adversarial:
        drawn = draw_preprompts(preprompts, prompt, params.num_preprompts, params.template_share, stage.seed)
        asked = Asked(prompt, drawn)
        longest = max(asked.preprompted, key=lambda each: len(encode_prompt(each.messages, tokenizer)))
        if len(encode_prompt(longest.messages, tokenizer)) < context:
            fitting.append(asked)
        else:
            too_long.append(too_long_line(prompt, longest, tokenizer))
    num_without_risk = len(found.prompts) - len(adversarial)
    check_left(params, place, found, fitting, num_without_risk, len(too_long), context)
    chosen = {prompt.id for prompt in at_most([asked.prompt for asked in fitting], params.max_prompts)}
    used = [asked for asked in fitting if asked.prompt.id in chosen]
    return Taken(used, too_long, num_without_risk, found.num_evaluation)


def check_left(
    params: Params,
    place: Place,
    found: TakenPrompts,
    fitting: Sequence[Asked],
    num_without_risk: int,
    num_too_long: int,
    context: int,
) -> None:
    """Raise ValueError when no prompt is left."""
    if not fitting:
        raise ValueError(
            f"no adversarial prompt of round {place.name} is left in {params.prompts}: {num_without_risk} name no "
            f"`risk`, {found.num_evaluation} ask what the evaluation asks, {num_too_long} leave no room for an answer "
            f"in the models' context of {context} tokens once a pre-prompt is added, and {len(found.apart)} are held "
            f"out (`{SECTION}.num_held_out_prompts`): bring more, or shorter ones"
        )


def too_long_line(prompt: Prompt, asked: Prompt, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a line of too_long.jsonl; `asked` is the prompt as it doesn't fit, with a pre-prompt or without."""
    return {
        "id": prompt.id,
        "risk": prompt.risk,
        "messages": asked.messages,
        "num_tokens": len(encode_prompt(asked.messages, tokenizer)),
    }


# --- answers ---


def jobs_of(params: Params, asked: Sequence[Asked]) -> list[Job]:
    """Return what is to be drawn: a plain answer to each prompt, and answers with each of its pre-prompts."""
    plain = [each.prompt for each in asked]
    preprompted = [prompt for each in asked for prompt in each.preprompted]
    scored = [each.prompt for each in asked for _ in each.preprompts]
    return [
        Job("plain", "safety", params.temperature, 1, plain),
        Job("preprompted", "safety", params.temperature, params.num_samples, preprompted, scored),
    ]


def distill(
    params: Params, asked: Sequence[Asked], drawn: Mapping[str, Sequence[Sequence[Candidate]]], line: Line
) -> list[Distilled]:
    """Return each prompt with its answers, and what is chosen."""
    preprompted = iter(drawn["preprompted"])
    found = []
    for each, (plain,) in zip(asked, drawn["plain"], strict=True):
        candidates = [(number, own) for number in range(len(each.preprompts)) for own in next(preprompted)]
        found.append(choose(each, plain, candidates, line, params.gate))
    return found


def choose(
    asked: Asked, plain: Candidate, candidates: Sequence[tuple[int, Candidate]], line: Line, gate: bool
) -> Distilled:
    """Choose the safest of a prompt's pre-prompted answers, the first of equals; keep it if the gate lets it pass."""
    possible = [n for n, (_, each) in enumerate(candidates) if can_be_chosen(asked.prompt.messages, each)]
    rewards = [line.log_odds(each["safety"]) for _, each in candidates]
    best = max(possible, key=lambda number: rewards[number], default=None)
    is_kept = best is not None and (not gate or rewards[best] > line.log_odds(plain["safety"]))
    return Distilled(asked.prompt, asked.preprompts, plain, list(candidates), best, is_kept)


# --- lines of files ---


def dialogue_of(distilled: Distilled, round_name: str) -> dict[str, Any]:
    """Return a prompt, without a pre-prompt, with the answer that is kept: a line as in rejection sampling's files."""
    prompt = distilled.prompt
    return {
        "id": prompt.id,
        "messages": [*prompt.messages, {"role": "assistant", "content": distilled.chosen["text"]}],
        "category": prompt.category,
        "safety": True,
        "source": round_name,
        "kind": "safety",
    }


def sample_line(distilled: Distilled, round_name: str, model: str, fitted: Fitted) -> dict[str, Any]:
    """Return a line of samples.jsonl; without `best` if nothing could be chosen."""
    prompt = distilled.prompt

    def scored(candidate: Candidate) -> dict[str, Any]:
        log_odds, probability = (
            read(candidate["safety"]) for read in (fitted.safety.log_odds, fitted.safety.probability)
        )
        return {**candidate, "reward": log_odds, "safe_probability": probability}

    line = {
        **prompt._asdict(),
        "round": round_name,
        "model": model,
        "preprompts": [preprompt._asdict() for preprompt in distilled.preprompts],
        "plain": scored(distilled.plain),
        "candidates": [{"preprompt": number, **scored(each)} for number, each in distilled.candidates],
        "kept": distilled.is_kept,
    }
    return line if distilled.best is None else {**line, "best": distilled.best}


if __name__ == "__main__":
    start(Params, run)
