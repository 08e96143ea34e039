"""Draw K answers to each prompt of a round and keep the best (Llama 2, section 3.2.3, rejection sampling).

The newest chat model draws, the round's reward models score. Steps: calibrate both models' scores on held-out labels,
and choose the threshold of safety; search the temperature, for each kind of prompt, on prompts that nothing is trained
on; draw at that temperature; choose (tasks/sampling/choosing.py has the rules). The best and the random picks of
all earlier rounds are kept beside the round's own. Where there is a truth, the judge tells what the choice is worth; it
decides nothing. With `distil_from`, another model's chosen samples take the place of own ones, and nothing is drawn.

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
from typing import Any

from model.network.ranks import join_ranks
from tasks.judging.calibration import Threshold
from tasks.judging.ranking import Scales
from tasks.judging.scales import calibrate
from tasks.reading.contamination import read_evaluation
from tasks.reading.prompts import KINDS, Kind
from tasks.reading.rounds import round_of
from tasks.reading.taking import TakenPrompts, take_prompts
from tasks.rejection_sampling.reporting import best_reward, count_figures, report_rewards, report_truth
from tasks.running.files import write_json, write_lines
from tasks.running.places import NOTHING
from tasks.running.stage import Stage, start
from tasks.sampling.choosing import (
    WAYS,
    Choice,
    dialogue_of,
    earlier_best,
    merged,
    read_chosen,
    sample_line,
)
from tasks.sampling.drawing import Job, check_models, draw_and_score
from tasks.sampling.params import Params, choices_of, job_of, settings_of
from tasks.world.annotators import read_annotators
from tasks.world.judge import read_truth


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
    settings = settings_of(params, Path(place.round.newest), place.name, stage.seed, stage.scratch)
    taken = take_prompts(
        place, stage.section, params, params.num_search_prompts, *check_models(settings), read_evaluation()
    )
    scales, threshold = calibrate(place.name, params.threshold_precision)
    prompts = [prompt for kind in asked for prompt in taken[kind].prompts]
    best_before = earlier_best(earlier["best"], prompts, parameter)
    description = stage.name if stage.rank == 0 else None

    grid = sorted(set(params.temperatures))
    tried: dict[Kind, dict[float, list[Choice]]] = {kind: {} for kind in KINDS}
    if len(grid) > 1:
        jobs = [job_of(params, kind, each, taken[kind].apart, "search") for kind in asked for each in grid]
        searched = draw_and_score(settings, jobs, {}, description)
        for job in jobs:
            tried[job.kind][job.temperature] = choices_of(params, job, searched[job.name], scales, stage.seed)
    # `max` returns the first of equals: the lower temperature
    temperatures = {kind: max(grid, key=lambda each: best_reward(tried[kind][each])) for kind in asked if tried[kind]}
    jobs = [job_of(params, kind, temperatures.get(kind, grid[0]), taken[kind].prompts, "draw") for kind in asked]
    drawn = draw_and_score(settings, jobs, best_before, description)
    chosen: dict[Kind, list[Choice]] = {kind: [] for kind in KINDS}
    figures: dict[str, float] = threshold_figures(threshold) | {"distilled": 0}
    for job in jobs:
        chosen[job.kind] = choices_of(params, job, drawn[job.name], scales, stage.seed)
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
        f"{job.kind}/too_long": len(taken.too_long),
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
