"""Improve a round's version by proximal policy optimisation (Llama 2, section 3.2.3, PPO; Schulman et al. 2017).

An iteration samples one response to each of a batch of prompts from the policy, at temperature 1; scores them with both
reward models of the round, combined as for rejection sampling (`tasks/judging/ranking.py`); subtracts the KL penalty
per token against the starting policy; estimates advantages with the value model; and takes a step of both models for
each part of the batch. The value model starts from the helpfulness model and learns alone at first. On prompts that
nothing is trained on, the policy is tried every few iterations: the best one is kept, and training ends when the best
is `patience` tries old. Alarms (tasks/ppo/alarms.py) stop the stage. A run that was stopped, even killed, resumes from
its last saved state and reaches exactly the weights of an uninterrupted run.

Run once for each entry of `ppo.rounds` (`ppo@v5`). Reads the checkpoint to start from, both reward models, the prompts,
the evaluation's prompts, which are left out.
Writes a Hugging Face Llama directory with training.json, samples.jsonl (the last answers to held-out prompts), plots/.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from model.network.checkpoint import load_weights, open_checkpoint, read_config, save_model
from model.network.packing import Batch, batch_of_rows, num_rows, num_targets
from model.network.ranks import from_all_ranks, join_ranks
from model.network.transformer import Llama, num_parameters
from model.rlhf.losses import is_clipped
from model.rlhf.rollouts import Known, RolloutBatch, batch_of_rollouts, policy_loss, value_loss
from model.rlhf.value import ValueModel, draw_value_head
from model.scoring.answers import Asked, check_same_tokenizer, log_probabilities
from model.scoring.reward import open_reward
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, Step, build_model, num_micro_batches, start_engine, train_step
from tasks.judging.scales import calibrate
from tasks.learning.loop import Progress, Taken, digest_of, read_base, resume, run_steps
from tasks.learning.stream import Text, read_stream
from tasks.ppo.alarms import Alarms, check_alarms
from tasks.ppo.experience import (
    Answer,
    Drawing,
    Models,
    Weighing,
    draw,
    figures_of,
    measure,
    own_micro_batches,
    plan_batches,
    weigh,
)
from tasks.reading.contamination import read_evaluation
from tasks.reading.prompts import KINDS, Kind
from tasks.reading.rounds import Place, round_of
from tasks.reading.shares import Asked as AskedPrompt
from tasks.reading.shares import Numbers
from tasks.reading.taking import Asking, take_prompts
from tasks.running.files import write_lines
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start

VALUE_FROM: Kind = "helpfulness"  # the reward model whose layers the value model starts with


class Start(Section):
    """A round that ends with PPO."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory to start from")


class Params(EngineParams, Asking):
    """What is sampled, rewarded and learnt, and what is watched on the way; a row is a response with its prompt."""

    rounds: dict[str, Start] = Field(description="rounds that end with PPO, by their names")
    num_held_out_prompts: Numbers = Field(description="further prompts, on which the policy is tried")
    num_iterations: int = Field(gt=0, description="maximum iterations; each samples, scores and learns")
    num_prompts: int = Field(gt=0, description="prompts of an iteration, over all ranks; a response to each")
    epochs: int = Field(gt=0, description="uses of each response")
    value_warmup_iterations: int = Field(ge=0, description="first iterations, in which only the value model learns")
    value_learning_rate: float = Field(gt=0, description="peak of the value model's schedule")
    clip: float = Field(
        gt=0, lt=1, description="change of a token's probability, as a share, beyond which none is learnt"
    )
    value_clip: float = Field(gt=0, description="change of a value beyond which none is learnt")
    whitening: Literal["branch", "batch"] = Field(
        description="over which responses rewards get mean 0 and variance 1: each reward model's, or all"
    )
    kl_coefficient: float = Field(ge=0, le=1, description="whitened reward that a nat of KL costs")
    missing_eos_penalty: float = Field(ge=0, description="whitened reward that a response without its end loses")
    max_log_odds: float = Field(gt=0, description="rewards, as log-odds, are cut to this either way")
    discount: float = Field(gt=0, le=1, description="weight of a reward one token later")
    decay: float = Field(ge=0, le=1, description="lambda of generalised advantage estimation")
    text: str = Field(min_length=1, description="directory of the pretraining stream; read if `text_weight` is not 0")
    text_weight: float = Field(ge=0, description="weight of its mean loss beside the policy's; 0: off")
    text_rows: int = Field(gt=0, description="rows of it beside each step, over all ranks")
    threshold_precision: float = Field(gt=0, le=1, description="share of answers called unsafe that must be")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of a response, EOS included")
    max_rows: int = Field(gt=0, description="responses drawn at once; more need more memory")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more need more memory")
    alarms: Alarms = Field(description="limits; beyond one of them, the stage stops")
    validate_every: int = Field(gt=0, description="iterations between two tries on held-out prompts")
    patience: int = Field(gt=0, description="tries without a better policy after which training ends")
    num_shown: int = Field(ge=0, description="held-out prompts of each kind whose answers are shown at each try")
    log_every: int = Field(gt=0, description="iterations between two logged points")
    save_every: int = Field(gt=0, description="iterations between two saved states, from which a stopped run resumes")
    max_shard_bytes: int = Field(gt=0, description="maximum bytes of weights in one file of the checkpoint")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.num_prompts % self.batch_rows:
            raise ValueError(
                f"num_prompts {self.num_prompts} is not a multiple of batch_rows {self.batch_rows}: each response is "
                "learnt once an epoch, in steps of equal size"
            )
        if self.validate_every % self.save_every:
            raise ValueError(
                f"validate_every {self.validate_every} is not a multiple of save_every {self.save_every}: the best "
                "policy is kept beside the state that knows it"
            )
        if self.value_warmup_iterations >= self.num_iterations:
            raise ValueError(
                f"value_warmup_iterations {self.value_warmup_iterations} leaves none of num_iterations "
                f"{self.num_iterations} in which the policy learns"
            )
        if self.text_weight and self.text_rows % (self.batch_rows // self.micro_batch_rows):
            raise ValueError(
                f"text_rows {self.text_rows} do not divide among the {self.batch_rows // self.micro_batch_rows} micro "
                "batches of a step"
            )
        if not any(getattr(self.num_held_out_prompts, kind) for kind in KINDS):
            raise ValueError("num_held_out_prompts has none of any kind: the best policy is chosen on them")
        return self

    @property
    def steps_an_iteration(self) -> int:
        """Steps of each trained model in an iteration."""
        return self.epochs * self.num_prompts // self.batch_rows


@dataclass(frozen=True)
class Training:
    """One run: what is trained, on what prompts, and its progress."""

    stage: Stage[Params]
    base: Path
    policy: Any  # DeepSpeed's engine
    value: Any
    models: Models
    prompts: list[AskedPrompt]
    held_out: list[AskedPrompt]
    text: Text | None  # what the model was pretrained on, if it is learnt beside
    progress: Progress

    @property
    def drawing(self) -> Drawing:
        """How responses are drawn and scored."""
        params = self.stage.params
        return Drawing(params.max_new_tokens, params.max_rows, params.tokens_at_once, params.max_log_odds)


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train until the iterations or the patience end; keep the best policy."""
    training = prepare(stage)
    progress, params = training.progress, stage.params
    run_steps(
        stage,
        {"policy": training.policy, "value": training.value},
        progress,
        params.num_iterations,
        partial(take_iteration, training),
        validate=partial(validate, training),
        has_ended=lambda: int(progress.notes["worse"]) >= params.patience,
    )
    if stage.rank == 0:
        shutil.copytree(best_directory(stage, progress.notes["best"]["step"]), stage.output, dirs_exist_ok=True)
    return report(training)


def prepare(stage: Stage[Params]) -> Training:
    """Read prompts and models, and start the engines, or go on from where a stopped run left them."""
    params, place = stage.params, round_of(stage.name)
    base = Path(start_of(params, place).init_from)
    device = join_ranks()
    num_micro_batches(params, torch.distributed.get_world_size())  # refuses what doesn't divide before anything is read
    rewards = {kind: DATA / f"reward_{kind}" / place.name for kind in KINDS}
    config, tokenizer = read_base(base, 2, stage.section)
    contexts = [config.max_position_embeddings, *(check_reward(path, tokenizer) for path in rewards.values())]
    scales, _ = calibrate(place.name, params.threshold_precision)
    taken = take_prompts(
        place, stage.section, params, params.num_held_out_prompts, tokenizer, min(contexts), read_evaluation()
    )
    prompts = [AskedPrompt(kind, prompt) for kind in KINDS if kind in taken for prompt in taken[kind].prompts]
    held_out = [AskedPrompt(kind, prompt) for kind in KINDS if kind in taken for prompt in taken[kind].apart]
    if not prompts or not held_out:
        raise ValueError(f"params.yaml: `{stage.section}.max_prompts` is 0 for each kind: PPO has nothing to ask")
    num_steps = params.num_iterations * params.steps_an_iteration
    value_params = params.model_copy(update={"learning_rate": params.value_learning_rate})
    policy = build_model(Llama, config, params)
    load_weights(policy, base)
    value = build_model(ValueModel, read_config(rewards[VALUE_FROM]), value_params)
    load_weights(value, rewards[VALUE_FROM], part="model")
    draw_value_head(value, stage.seed)
    policy_steps = num_steps - params.value_warmup_iterations * params.steps_an_iteration
    engines = {
        "policy": start_engine(policy, params, policy_steps),
        "value": start_engine(value, value_params, num_steps),
    }
    models = Models(
        tokenizer,
        open_checkpoint(base, params.precision, device)[0],
        {kind: open_reward(path, params.precision, device)[0] for kind, path in rewards.items()},
        rewards,
        scales,
    )
    notes: dict[str, Any] = {"best": None, "worse": 0, "deviations": {}, "first_length": None, "samples": []}
    progress = resume(stage, engines, Progress({"tokens": 0, "responses": 0}, notes))
    text = read_stream(Path(params.text))[0] if params.text_weight else None
    return Training(stage, base, engines["policy"], engines["value"], models, prompts, held_out, text, progress)


def start_of(params: Params, place: Place) -> Start:
    """Return where a round's PPO starts. Raises ValueError when params.yaml has no such entry."""
    if place.name not in params.rounds:
        entries = ", ".join(f"ppo@{name}" for name in params.rounds) or "none"
        raise ValueError(f"params.yaml: `ppo.rounds` has no `{place.name}`: it has {entries}")
    return params.rounds[place.name]


def check_reward(directory: Path, tokenizer: Tokenizer) -> int:
    """Return a reward model's context, tokens. Raises ValueError when its tokenizer is another one."""
    config = read_config(directory)
    check_same_tokenizer(Tokenizer(directory / "tokenizer.model"), tokenizer)
    return config.max_position_embeddings


# --- an iteration ---


def prompts_of(prompts: Sequence[AskedPrompt], number: int, count: int, seed: int) -> list[AskedPrompt]:
    """Return the prompts of iteration `number`: the next `count` of endless passes, each in an order of its own."""
    places = range(number * count, (number + 1) * count)
    passes = {place // len(prompts) for place in places}
    orders = {each: np.random.default_rng((seed, each)).permutation(len(prompts)).tolist() for each in passes}
    return [prompts[orders[place // len(prompts)][place % len(prompts)]] for place in places]


def take_iteration(training: Training) -> Taken:
    """Sample, score and measure a batch of responses, audit it, then learn from it."""
    stage, params, progress, models = training.stage, training.stage.params, training.progress, training.models
    asked = prompts_of(training.prompts, progress.step, params.num_prompts, stage.seed)
    began = time.perf_counter()
    answers = draw(training.policy, models, asked, f"{stage.seed} {stage.name} {progress.step}", training.drawing)
    drawn = time.perf_counter()
    rollouts = [answer.rollout for answer in answers]
    steps = plan_batches(rollouts, params.batch_rows, params.micro_batch_rows, (stage.seed, progress.step))
    measured = measure(training.policy, training.value, models.reference, rollouts, steps)
    seen = figures_of(answers, measured)
    if progress.notes["first_length"] is None:
        progress.notes["first_length"] = seen["length"]
    best = progress.notes["best"]["step"]
    kept = best, best_directory(stage, best)
    check_alarms(params.alarms, progress.step, seen, progress.notes["first_length"], kept)
    weighing = Weighing(
        params.whitening, params.kl_coefficient, params.missing_eos_penalty, params.discount, params.decay
    )
    known, explained = weigh(answers, measured, weighing)
    measured_at = time.perf_counter()
    learnt = learn(training, answers, known, steps)
    seconds = {
        "sampling": drawn - began,
        "measuring": measured_at - drawn,
        "training": time.perf_counter() - measured_at,
    }
    at = {"step": progress.step + 1, "tokens": progress.counts["tokens"]}
    stage.log({f"seconds/{name}": value for name, value in seconds.items()}, **at)
    return Taken(
        found={**learnt, **seen, "explained_variance": explained},
        used={"tokens": sum(len(each.ids) for each in rollouts) * params.epochs, "responses": len(rollouts)},
        sources=lambda: [f"{each.kind} {each.prompt.id}" for each in asked],
    )


def learn(
    training: Training, answers: Sequence[Answer], known: Sequence[Known], steps: Sequence[Sequence[Sequence[int]]]
) -> dict[str, float]:
    """Take the steps of an iteration with both models; return their mean losses and norms, ratio and clipped share."""
    params, progress, device = training.stage.params, training.progress, training.policy.device
    is_warm = progress.step >= params.value_warmup_iterations
    texts = iter(texts_of(training, len(steps)))
    sums = torch.zeros(3, device=device)  # of ratios, of clipped tokens, of tokens
    taken: dict[str, list[Step]] = {"policy": [], "value": []}

    def policy_loss_of(engine: Any, batch: RolloutBatch) -> Tensor:
        text, share = next(texts)
        loss, log_probabilities_T = policy_loss(engine, batch, params.clip, text, params.text_weight * share * count)
        sampled_T, _, advantages_T, _ = batch.known
        clipped_T = is_clipped(log_probabilities_T, sampled_T, advantages_T, params.clip) & batch.is_target
        ratios_T = (log_probabilities_T - sampled_T).exp() * batch.is_target
        sums.add_(torch.stack((ratios_T.sum(), clipped_T.sum(), batch.is_target.sum())))
        return loss

    for epoch in range(params.epochs):
        order = np.random.default_rng((training.stage.seed, progress.step, epoch)).permutation(len(steps))
        for place in order.tolist():
            batches = [
                batch_of_rollouts([answers[n].rollout for n in numbers], [known[n] for n in numbers], device)
                for numbers in own_micro_batches(steps[place])
            ]
            count = sum(len(answers[n].rollout.response) for numbers in steps[place] for n in numbers)
            if is_warm:
                taken["policy"].append(train_step(training.policy, batches, policy_loss_of, count, is_finite))
            value_loss_of = partial(value_loss, clip=params.value_clip)
            taken["value"].append(train_step(training.value, batches, value_loss_of, count, is_finite))
    torch.distributed.all_reduce(sums)
    ratio_sum, num_clipped, num_tokens = sums.tolist()
    policy, value = taken["policy"], taken["value"]
    return {
        "loss": statistics.fmean(step.loss for step in policy) if policy else 0.0,
        "gradient_norm": statistics.fmean(step.gradient_norm for step in policy) if policy else 0.0,
        "learning_rate": policy[-1].learning_rate if policy else 0.0,
        "ratio": ratio_sum / num_tokens if policy else 1.0,
        "clip_share": num_clipped / num_tokens if policy else 0.0,
        "value/loss": statistics.fmean(step.loss for step in value),
        "value/gradient_norm": statistics.fmean(step.gradient_norm for step in value),
    }


def texts_of(training: Training, num_steps: int) -> Iterator[tuple[Batch | None, float]]:
    """Yield what each of this rank's policy micro batches of an iteration reads beside its responses, if anything.

    With it comes 1 / the number of tokens that all texts of its step predict. Steps go through the stream in order,
    again and again, from where the iteration before has stopped.
    """
    params, text = training.stage.params, training.text
    if text is None:
        yield from repeat((None, 0.0))
        return
    context = training.policy.module.config.max_position_embeddings
    num_micro = params.batch_rows // params.micro_batch_rows
    at_once = params.text_rows // num_micro
    own = own_micro_batches([[number] for number in range(num_micro)])
    rows = num_rows(text.tokens, context) // params.text_rows * params.text_rows
    if not rows:
        raise ValueError(
            f"{params.text} has {len(text.tokens):,} tokens, too few for a step of `ppo.text_rows` {params.text_rows} "
            f"rows of {context}: lower it"
        )
    taken = max(0, training.progress.step - params.value_warmup_iterations) * params.epochs * num_steps
    for step in range(taken, taken + params.epochs * num_steps):
        first = step * params.text_rows % rows
        total = num_targets(text.starts, first * context, (first + params.text_rows) * context)
        for (number,) in own:
            begin = first + number * at_once
            yield batch_of_rows(text.tokens, text.starts, begin, at_once, context, training.policy.device), 1 / total


def is_finite(loss: float, gradient_norm: float) -> bool:
    """Return whether a step may be taken."""
    return math.isfinite(loss) and math.isfinite(gradient_norm)


# --- held-out prompts ---


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


# --- the end ---

PLOTS = {  # name of the plot: its title, the label of its values, and which of the figures of training it shows
    "rewards": ("Reward of sampled responses", "log-odds (nats)", ["reward", "helpfulness/reward", "safety/reward"]),
    "kl": ("KL from the starting policy", "nats per response", ["kl", "kl_k3"]),
    "entropy": ("Entropy of the policy", "nats per token", ["entropy"]),
    "length": ("Length of responses", "tokens", ["length"]),
    "shares": ("Shares", "share", ["finished", "safety_branch", "clip_share", "explained_variance"]),
    "value": ("Loss of the value model", "squared error, halved", ["value/loss"]),
}
HELD_OUT = Plot("curves", "Objective on held-out prompts", "iteration", "value", "iteration", "deviations", "measure")


def report(training: Training) -> dict[str, float]:
    """Write the curves and the last answers; return the figures."""
    import pandas

    stage, progress = training.stage, training.progress
    first, best = progress.validation[0], progress.notes["best"]
    chosen = next(row for row in progress.validation if row["step"] == best["step"])
    if stage.rank == 0:
        write_lines(
            stage.output / "samples.jsonl", [row for row in progress.notes["samples"] if row["step"] == best["step"]]
        )
        for name, (title, label, measures) in PLOTS.items():
            rows = [
                {"iteration": row["step"], "measure": measure, "value": row[measure]}
                for measure in measures
                for row in progress.train
            ]
            plot = Plot("curves", title, "iteration", "value", "iteration", label, "measure")
            stage.plot(name, pandas.DataFrame(rows), plot)
        tries = [
            {"iteration": row["step"], "measure": measure, "value": row[measure]}
            for measure in ("objective", "reward", "helpfulness/reward", "safety/reward")
            for row in progress.validation
            if measure in row
        ]
        stage.plot("held_out", pandas.DataFrame(tries), HELD_OUT)
    last = progress.train[-1]
    steps = max(0, best["step"] - stage.params.value_warmup_iterations) * stage.params.steps_an_iteration
    return {
        "parameters": num_parameters(training.policy.module.config),
        "iterations": progress.step,
        "steps": steps,  # of the policy that is kept: a control takes as many
        "best_iteration": best["step"],
        "prompts": len(training.prompts),
        "held_out_prompts": len(training.held_out),
        "responses": progress.counts["responses"],
        "tokens": progress.counts["tokens"],
        **{f"train/{name}": last[name] for name in ("reward", "kl", "entropy", "length", "explained_variance")},
        **{f"validation/{name}": value for name, value in chosen.items() if name not in ("step", "tokens")},
        "validation/gain": chosen["objective"] - first["objective"],
    }


if __name__ == "__main__":
    start(Params, run)
