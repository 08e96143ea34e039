"""Try the policy on prompts that nothing is trained on, and keep the best one (Llama 2, section 3.2.3)."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from model.network.checkpoint import save_model
from model.network.ranks import from_all_ranks
from model.scoring.answers import Asked, log_probabilities
from tasks.learning.loop import digest_of
from tasks.ppo.experience import Answer, Models, draw
from tasks.ppo.training import Params, Training
from tasks.reading.prompts import KINDS
from tasks.running.stage import Stage


def validate(training: Training) -> None:
    """Try the policy on the held-out prompts, and keep it if it is the best so far; show some answers.

    What is compared is the objective of training (Llama 2, section 3.2.3): the mean reward, in deviations of the
    starting policy's, less the KL penalty. Each time the same random numbers are drawn.
    """
    stage, params, progress, models = training.stage, training.stage.params, training.progress, training.models
    answers = draw(training.policy, models, training.held_out, f"{stage.seed} {stage.name} held out", training.drawing)
    values = [answer.reward.value for answer in answers]
    if not progress.notes["deviations"]:
        progress.notes["deviations"] = deviations_of(answers, params.whitening)
    deviations = progress.notes["deviations"]
    kl = statistics.fmean(divergences(answers, models, params.tokens_at_once))
    found = {
        "reward": statistics.fmean(values),
        "kl": kl,
        "length": statistics.fmean(len(answer.rollout.response) for answer in answers),
        "finished": statistics.fmean(answer.finished for answer in answers),
        **{
            f"{kind}/reward": statistics.fmean(own)
            for kind in KINDS
            if (own := [answer.reward.value for answer in answers if answer.kind == kind])
        },
    }
    gains = [answer.reward.value / deviations[answer.reward.branch] for answer in answers]
    found["objective"] = statistics.fmean(gains) - params.kl_coefficient * kl
    at = {"step": progress.step, "tokens": progress.counts["tokens"]}
    progress.validation.append({**at, **found})
    stage.log({f"validation/{name}": value for name, value in found.items()}, **at)
    keep_if_best(training, found["objective"])
    show(training, answers)


def deviations_of(answers: Sequence[Answer], whitening: str) -> dict[str, float]:
    """Return what a branch's rewards are divided by: their standard deviation, or that of all."""
    values = {kind: [answer.reward.value for answer in answers if answer.reward.branch == kind] for kind in KINDS}
    together = [value for own in values.values() for value in own]
    return {
        kind: max(statistics.pstdev(own if own and whitening == "branch" else together), 1e-6)
        for kind, own in values.items()
    }


def divergences(answers: Sequence[Answer], models: Models, tokens_at_once: int) -> list[float]:
    """Return the log-ratio of the policy's and the reference's probability of each response; the ranks share them."""
    own = range(torch.distributed.get_rank(), len(answers), torch.distributed.get_world_size())
    asked = [Asked(answers[number].rollout.prompt, [answers[number].rollout.response]) for number in own]
    reference = [each for (each,) in log_probabilities(models.reference, asked, tokens_at_once)]
    return from_all_ranks(
        {number: answers[number].log_probability - each for number, each in zip(own, reference, strict=True)}
    )


def best_directory(stage: Stage[Params], step: int) -> Path:
    """Return where the policy of an iteration is kept while it is the best one."""
    return stage.scratch / f"best-{step}"


def keep_if_best(training: Training, objective: float) -> None:
    """Save the policy if no earlier one was better, and count for how long none was.

    The one before stays, as a run that is killed now resumes from a state that knows only that one.
    """
    stage, progress = training.stage, training.progress
    before = progress.notes["best"]
    if before is not None and objective <= before["objective"]:
        progress.notes["worse"] += 1
        return
    progress.notes |= {"best": {"step": progress.step, "objective": objective}, "worse": 0}
    known = {best_directory(stage, best["step"]) for best in (before, progress.notes["best"]) if best is not None}
    directory = best_directory(stage, progress.step)
    if stage.rank == 0:
        for path in [*stage.scratch.glob("best-*")]:
            if path not in known or path == directory:
                shutil.rmtree(path)
    torch.distributed.barrier()
    written = {"step": progress.step, "tokens": progress.counts["tokens"], "base_sha256": digest_of(training.base)}
    save_model(training.policy.module, training.models.tokenizer, directory, written, stage.params.max_shard_bytes)


def show(training: Training, answers: Sequence[Answer]) -> None:
    """Add some answers to the table of samples."""
    import pandas

    stage, progress = training.stage, training.progress
    for kind in KINDS:
        own = [answer for answer in answers if answer.kind == kind]
        for answer in own[: stage.params.num_shown]:
            progress.notes["samples"].append(
                {
                    "step": progress.step,
                    "kind": kind,
                    "category": answer.prompt.category,
                    "prompt": answer.prompt.messages[-1]["content"],
                    "answer": answer.text(training.models.tokenizer),
                    "finished": answer.finished,
                    "helpfulness": answer.helpfulness,
                    "safety": answer.safety,
                    "branch": answer.reward.branch,
                    "reward": answer.reward.value,
                }
            )
    if stage.rank == 0:
        pandas.DataFrame(progress.notes["samples"]).to_csv(stage.tables / "samples.csv", index=False)
