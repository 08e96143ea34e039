"""Compare versions with the baseline, the version before and their controls, paired by prompt (sections 3.4.1, 3.4.2).

Each version's answers are set against each opponent's, for helpfulness (all prompts but adversarial ones) and for
harmlessness (adversarial prompts) apart, by up to three judges:

- utility: the world's judge, by what an answer is worth to the average annotator. A difference below that annotator's
  threshold of `slightly` is a tie. Without a truth there is no such judge.
- annotators: those who rated both answers (stage `evaluate`), who have tastes and err; the median of their ratings on
  seven points decides. Their agreement is Gwet's AC2.
- rewards: the reward models of one round, each on its kind of prompts. An answer that is empty or holds a tag of the
  chat format loses against any other; a prompt with an answer too long for the model is left out.

Progress that the reward models see and the truth does not is over-optimisation (Goodhart's law), so the win rates stand
side by side. They count ties as halves. Beside each stands the win rate at equal lengths
(tasks/judging/lengths.py). Intervals are over prompts: of shares Wilson's, of win rates and of means Student's, of
differences the paired bootstrap's. P-values are also given as adjusted by Holm's method over the versions: each is
compared with the baseline, with versions before it, and with controls, and these are a family each.

Reads the answers of all evaluations that params.yaml names, and two reward models.
Writes win_rates.csv and .jsonl, win_rates_by_part.csv, seven_points.csv, differences.csv, versions.csv and .jsonl (all
evaluations), scores.jsonl (the reward models'), plots/ and tables/.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from model.network.ranks import join_ranks
from tasks.compare.comparisons import adjusted, compare, differences, figures_of
from tasks.compare.evaluations import pairs_of, read_evaluations
from tasks.compare.judges import judges_of
from tasks.compare.reporting import comparison_figures, difference_figures, write_comparisons, write_versions
from tasks.compare.scoring import score_evaluations, write_scores
from tasks.running.names import metric_name
from tasks.running.params import Section, parse_section, read_params
from tasks.running.stage import Stage, start
from tasks.world.annotators import read_annotators


class Params(Section):
    """Which versions are compared with what, and by which reward models."""

    baseline: str = Field(min_length=1, description="evaluation that every version is compared with")
    opponents: dict[str, list[str]] = Field(description="evaluations that each version is compared with, too")
    rewards: str = Field(min_length=1, description="round of the two reward models that judge")
    reward_tie: float = Field(ge=0, description="scores that differ by less are a tie; 0: equal scores alone")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more take more memory")


class Evaluations(BaseModel):
    """The evaluations in section `evaluate` of params.yaml; only that stage reads the rest of the section."""

    checkpoints: dict[str, str] = Field(min_length=1, description="checkpoint of each evaluation, by its name")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Read all answers, score them, compare, report."""
    params = stage.params
    evaluations = read_evaluations(list(parse_section(Evaluations, read_params(), "evaluate").checkpoints))
    pairs = [
        (*pair, role_of(pair[1], params).partition(" ")[0])
        for pair in pairs_of(params.baseline, params.opponents, list(evaluations))
    ]
    scores = score_evaluations(params.rewards, evaluations, params.precision, params.tokens_at_once, join_ranks())
    judged = all(line["utility"] is not None for answers in evaluations.values() for line in answers.values())
    annotators = read_annotators() if judged else None
    judges = judges_of(evaluations, scores, params.reward_tie, annotators, stage.seed)
    found = [compare(*pair, evaluations, judges) for pair in pairs]
    comparisons = adjusted([each for own, _ in found for each in own])
    shares = differences(pairs, evaluations)
    versions = {name: figures_of(answers, scores[name]) for name, answers in evaluations.items()}
    if stage.rank == 0:
        write_comparisons(stage, params.baseline, comparisons, [part for _, parts in found for part in parts], shares)
        write_versions(stage, {name: role_of(name, params) for name in versions}, versions)
        write_scores(stage.output / "scores.jsonl", evaluations, scores)
    return {
        "evaluations": len(evaluations),
        "comparisons": len(pairs),
        "answers_too_long": sum(value is None for own in scores.values() for value in own.values()),
        **comparison_figures(comparisons, next(reversed(params.opponents), None), params.baseline),
        **difference_figures(shares),
        **{
            f"{metric_name(name)}/{figure}": estimate.value
            for name, figures in versions.items()
            for figure, estimate in figures.items()
        },
    }


def role_of(name: str, params: Params) -> str:
    """Return what an evaluation is to the comparison."""
    if name == params.baseline:
        return "baseline"
    if name in params.opponents:
        return "version"
    versions = [version for version, opponents in params.opponents.items() if name in opponents]
    return f"control of {', '.join(versions)}" if versions else "other"


if __name__ == "__main__":
    start(Params, run)
