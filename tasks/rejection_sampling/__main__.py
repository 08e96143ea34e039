"""Draw K answers to each prompt of a round and keep the best (Llama 2, section 3.2.3, rejection sampling).

The newest chat model draws, the round's reward models score. Steps: calibrate both models' scores on held-out labels,
and choose the threshold of safety; search the temperature, for each kind of prompt, on prompts that nothing is trained
on; draw at that temperature; choose (tasks/rejection_sampling/choosing.py has the rules). The best and the random picks
of all earlier rounds are kept beside the round's own. Where there is a truth, the judge tells what the choice is worth;
it decides nothing. With `distil_from`, another model's chosen samples take the place of own ones, and nothing is drawn.

An answer that was cut is scored as if the model had ended it, as reward models know no other answers; it ranks below
every one that can be chosen, and never is. Prompts that ask what the evaluation asks are left out.

Run once for each round (`rejection_sampling@v1`). Reads the newest checkpoint, both reward models, the prompt files,
the earlier samples, the evaluation's prompts, the truth.
Writes samples.jsonl, unanswered.jsonl (prompts without an answer that can be chosen), best.jsonl and random.jsonl
(dialogues, of all rounds so far), calibration.json, plots/.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.network.ranks import join_ranks
from tasks.judging.calibration import Threshold
from tasks.judging.ranking import Scales
from tasks.judging.scales import calibrate
from tasks.reading.contamination import read_evaluation
from tasks.reading.prompts import KINDS, Kind, Prompt
from tasks.reading.rounds import Place, round_of
from tasks.reading.shares import Numbers
from tasks.reading.taking import Asking, TakenPrompts, take_prompts
from tasks.rejection_sampling.choosing import (
    WAYS,
    Choice,
    choose,
    dialogue_of,
    earlier_best,
    merged,
    read_chosen,
    sample_line,
)
from tasks.rejection_sampling.drawing import Candidate, Job, Settings, check_models, draw_and_score
from tasks.rejection_sampling.reporting import best_reward, count_figures, report_rewards, report_truth
from tasks.running.files import write_json, write_lines
from tasks.running.params import Section
from tasks.running.places import DATA, NOTHING
from tasks.running.stage import Stage, start
from tasks.world.annotators import read_annotators
from tasks.world.judge import read_truth


class Samples(Section):
    """How many answers to a prompt of each kind."""

    helpfulness: int = Field(gt=0, description="samples a prompt; 1: nothing is chosen")
    safety: int = Field(gt=0, description="samples a prompt; 1: nothing is chosen")


class Weights(Section):
    """How much an answer's log-probability counts beside its reward, for each kind of prompt."""

    helpfulness: float = Field(ge=0, description="log-odds for each nat of log-probability; 0: off")
    safety: float = Field(ge=0, description="log-odds for each nat of log-probability; 0: off")


class Params(Asking):
    """Which prompts are asked, how answers are drawn, scored and chosen."""

    num_search_prompts: Numbers = Field(description="further prompts of one round, to search the temperature on")
    num_samples: Samples = Field(description="answers drawn to each prompt")
    temperatures: list[float] = Field(min_length=1, description="those that are tried; one: there is no search")
    top_p: float = Field(gt=0, le=1, description="draw among the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw among this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of an answer, EOS included")
    threshold_precision: float = Field(gt=0, le=1, description="share of answers called unsafe that must be")
    log_probability_weight: Weights = Field(description="against over-optimised rewards")
    truth: str | None = Field(description="directory of what the judge knows, for the report; null: none")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers drawn at once; more need more memory")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more need more memory")
    save_every: int = Field(gt=0, description="prompts between two saves")

    @model_validator(mode="after")
    def _is_searchable(self) -> Self:
        if min(self.temperatures) <= 0:
            raise ValueError(f"`temperatures` {self.temperatures}: answers that are all the likeliest are all the same")
        missing = [
            kind for kind in KINDS if getattr(self.max_prompts, kind) and not getattr(self.num_search_prompts, kind)
        ]
        if len(set(self.temperatures)) > 1 and missing:
            raise ValueError(
                f"`temperatures` has several to choose from, and `num_search_prompts.{missing[0]}` is 0: there is no "
                "prompt to try them on"
            )
        return self


def run(stage: Stage[Params]) -> dict[str, float]:
    """Calibrate, search the temperatures, draw, choose, report."""
    params, place = stage.params, round_of(stage.name)
    parameter = f"rounds.{place.name}.samples"
    earlier = read_chosen(Path(place.round.samples), parameter)
    if Path(place.round.distil_from) != NOTHING:
        distilled = read_chosen(Path(place.round.distil_from), f"rounds.{place.name}.distil_from")
        return write_chosen(stage, earlier, distilled, []) | {"distilled": len(distilled["best"])}
    asked = [kind for kind in KINDS if getattr(params.max_prompts, kind)]
    if not asked:
        return write_chosen(stage, earlier, {way: [] for way in WAYS}, []) | {"distilled": 0}
    join_ranks()
    settings = settings_of(stage, place)
    taken = take_prompts(
        place, stage.section, params, params.num_search_prompts, *check_models(settings), read_evaluation()
    )
    scales, threshold = calibrate(place.name, params.threshold_precision)
    prompts = [prompt for kind in asked for prompt in taken[kind].prompts]
    best_before = earlier_best(earlier["best"], prompts, parameter)
    description = stage.name if stage.rank == 0 else None

    def choices_of(job: Job, found: Sequence[Sequence[Candidate]]) -> list[Choice]:
        weight = getattr(params.log_probability_weight, job.kind)
        return [
            choose(job.kind, prompt, job.temperature, own, scales, weight, stage.seed)
            for prompt, own in zip(job.prompts, found, strict=True)
        ]

    grid = sorted(set(params.temperatures))
    tried: dict[Kind, dict[float, list[Choice]]] = {kind: {} for kind in KINDS}
    if len(grid) > 1:
        jobs = [job_of(params, kind, each, taken[kind].apart, "search") for kind in asked for each in grid]
        searched = draw_and_score(settings, jobs, {}, description)
        for job in jobs:
            tried[job.kind][job.temperature] = choices_of(job, searched[job.name])
    # `max` returns the first of equals: the lower temperature
    temperatures = {kind: max(grid, key=lambda each: best_reward(tried[kind][each])) for kind in asked if tried[kind]}
    jobs = [job_of(params, kind, temperatures.get(kind, grid[0]), taken[kind].prompts, "draw") for kind in asked]
    drawn = draw_and_score(settings, jobs, best_before, description)
    chosen: dict[Kind, list[Choice]] = {kind: [] for kind in KINDS}
    figures: dict[str, float] = threshold_figures(threshold) | {"distilled": 0}
    for job in jobs:
        chosen[job.kind] = choices_of(job, drawn[job.name])
        if len(grid) == 1:
            tried[job.kind][job.temperature] = chosen[job.kind]
        figures |= prompt_figures(job, taken[job.kind]) | count_figures(job.kind, chosen[job.kind], scales)
        check_answered(job, chosen[job.kind], params.max_new_tokens)
    choices = [choice for kind in KINDS for choice in chosen[kind]]
    new = {way: [dialogue_of(choice, way) for choice in choices if choice.is_answered] for way in WAYS}
    lines = [sample_line(choice, place.name, place.round.newest, scales) for choice in choices]
    figures |= write_chosen(stage, earlier, new, lines)
    if stage.rank == 0:
        write_json(stage.output / "calibration.json", calibration_of(scales, threshold))
        figures |= report_rewards(stage, chosen, tried)
        if params.truth is not None:
            answered = {kind: [choice for choice in own if choice.is_answered] for kind, own in chosen.items()}
            figures |= report_truth(stage, answered, read_truth(Path(params.truth)), read_annotators())
    return figures


def settings_of(stage: Stage[Params], place: Place) -> Settings:
    """Return how everything is drawn and scored."""
    params = stage.params
    return Settings(
        policy=Path(place.round.newest),
        rewards={kind: DATA / f"reward_{kind}" / place.name for kind in KINDS},
        round_name=place.name,
        seed=stage.seed,
        top_p=params.top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        precision=params.precision,
        max_rows=params.max_rows,
        tokens_at_once=params.tokens_at_once,
        save_every=params.save_every,
        scratch=stage.scratch,
    )


def job_of(params: Params, kind: Kind, temperature: float, prompts: Sequence[Prompt], purpose: str) -> Job:
    """Return what is to be drawn for one kind at one temperature."""
    return Job(f"{purpose}-{kind}-{temperature}", kind, temperature, getattr(params.num_samples, kind), prompts)


# --- prompts ---


def check_answered(job: Job, choices: Sequence[Choice], max_new_tokens: int) -> None:
    """Raise ValueError when no prompt of a kind has an answer that can be chosen."""
    if any(choice.is_answered for choice in choices):
        return
    candidates = [each for choice in choices for each in choice.candidates]
    num_empty = sum(not each["text"] for each in candidates)
    num_cut = sum(not each["finished"] for each in candidates)
    raise ValueError(
        f"none of the {len(choices)} {job.kind} prompts has an answer that can be chosen: of {len(candidates)} "
        f"different ones, {num_empty} are empty and {num_cut} were cut at `rejection_sampling.max_new_tokens` "
        f"{max_new_tokens} or the context's end: raise it, or look at the chat model's answers"
    )


def prompt_figures(job: Job, taken: TakenPrompts) -> dict[str, float]:
    """Return how many prompts there are, and at which temperature they are answered."""
    return {
        f"{job.kind}/prompts": len(taken.prompts),
        f"{job.kind}/search_prompts": len(taken.apart),
        f"{job.kind}/evaluation_prompts": taken.num_evaluation,
        f"{job.kind}/too_long": taken.num_too_long,
        f"{job.kind}/temperature": job.temperature,
    }


# --- calibration ---


def calibration_of(scales: Scales, threshold: Threshold) -> dict[str, Any]:
    """Return the content of calibration.json."""
    lines = {"helpfulness": scales.helpfulness._asdict(), "safety": scales.safety._asdict()}
    return {**lines, **threshold._asdict()}


def threshold_figures(threshold: Threshold) -> dict[str, float]:
    """Return the threshold and how often it is right, as metrics."""
    return {
        f"threshold/{name}" if name != "threshold" else name: value
        for name, value in threshold._asdict().items()
        if value is not None
    }


# --- output ---


def write_chosen(
    stage: Stage[Params],
    earlier: Mapping[Any, Sequence[Mapping[str, Any]]],
    new: Mapping[Any, Sequence[Mapping[str, Any]]],
    lines: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
    """Write the samples, and what is chosen of this round and all earlier ones; return their numbers."""
    together = {way: merged(earlier[way], new[way]) for way in WAYS}
    if stage.rank == 0:
        write_lines(stage.output / "samples.jsonl", (line for line in lines if "best" in line))
        write_lines(stage.output / "unanswered.jsonl", (line for line in lines if "best" not in line))
        for way in WAYS:
            write_lines(stage.output / f"{way}.jsonl", together[way])
    return {"dialogues": len(together["best"]), "dialogues_earlier": len(earlier["best"])}


if __name__ == "__main__":
    start(Params, run)
