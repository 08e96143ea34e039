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
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.network.checkpoint import load_weights, open_checkpoint, read_config
from model.network.packing import Batch, batch_of_rows, num_rows, num_targets
from model.network.ranks import join_ranks
from model.network.transformer import Llama
from model.rlhf.losses import is_clipped
from model.rlhf.rollouts import Known, RolloutBatch, batch_of_rollouts, policy_loss, value_loss
from model.rlhf.value import ValueModel, draw_value_head
from model.scoring.answers import check_same_tokenizer
from model.scoring.reward import open_reward
from model.text.tokenizer import Tokenizer
from model.training.engine import Step, build_model, num_micro_batches, start_engine, train_step
from tasks.judging.scales import calibrate
from tasks.learning.loop import Progress, Taken, read_base, resume, run_steps
from tasks.learning.stream import read_stream
from tasks.ppo.alarms import check_alarms
from tasks.ppo.experience import (
    Answer,
    Models,
    Weighing,
    draw,
    figures_of,
    measure,
    own_micro_batches,
    plan_batches,
    weigh,
)
from tasks.ppo.reporting import report
from tasks.ppo.training import Params, Training
from tasks.ppo.trying import best_directory, validate
from tasks.reading.contamination import read_evaluation
from tasks.reading.prompts import KINDS, Kind
from tasks.reading.rounds import entry_at, round_of
from tasks.reading.shares import Asked as AskedPrompt
from tasks.reading.taking import take_prompts
from tasks.running.places import DATA
from tasks.running.stage import Stage, start

VALUE_FROM: Kind = "helpfulness"  # the reward model whose layers the value model starts with


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
    base = Path(entry_at(place, params.rounds, stage.section).init_from)
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


if __name__ == "__main__":
    start(Params, run)
