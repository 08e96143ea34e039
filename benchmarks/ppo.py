"""Compare PPO with TRL's PPOTrainer: what is learnt from the same responses, and how long an iteration takes.

    pip install 'accelerate>=1.10' 'transformers>=5.0' trl==1.12.0 datasets
    OMP_WAIT_POLICY=passive python -m benchmarks.ppo [loss] [speed]

TRL 1.12.0 is the last version that has a PPOTrainer, and the extra `benchmark` asks for a later one: install it in an
environment of its own. Everything runs on the CPU, with as many threads as processors. Both sides open the same
checkpoints. Each runs in its own process, and they take their iterations in turns, so that other load on the machine
affects them alike.

- loss: TRL's trainer takes a few steps in float32; what its loop computes on the way is caught just before each
  backward pass, with the weights of that moment. On the same weights, responses, log-probabilities, values, advantages
  and returns, our losses and gradients must be the same, and so must what leads to them.
- speed: responses per second of whole iterations (sampling, scoring, measuring, steps of policy and value model): the
  stage's own `take_iteration` against PPOTrainer's loop, in each precision. Same prompts, lengths, epochs and steps.

Where TRL's formulas differ, like is compared with like:

- It whitens advantages with the variance over n - 1 tokens, we over n: ours are multiplied by sqrt((n - 1) / n).
- It gives a response that ended one more place, after its EOS. The score stands there, and the value model learns a
  value for it. With us the score belongs to EOS, after which there is nothing to expect. Our formulas are given TRL's
  places; the policy's loss is over the response's tokens on both sides.
- Its loss is a mean over the tokens of a micro batch, ours over those of a step: a step is one micro batch here.
- It adds both losses, the value's times `vf_coef`, which is 1 here; we take the steps of two engines.
- It neither whitens the scores as Llama 2 does nor limits the gradient's norm: neither is compared.

Two things of TRL's loop are set right. As written it accumulates gradients over all micro batches of an iteration, so
it takes a single step an epoch, whatever `num_mini_batches` (but one for each micro batch when the data's last batch is
read): here it steps where we do. And `bf16` in its settings has no effect with transformers 5, as it starts Accelerate
without it: Accelerate's environment variable switches autocast on. One thing stays uneven: TRL asks one reward model,
our stage always asks two, so each response is scored twice here.
"""

from __future__ import annotations

import inspect
import io
import itertools
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.pretrain import CPU, engine_params, join_alone
from benchmarks.pretrain import SIZES as PRETRAINED
from benchmarks.sampling import SIZES as SAMPLED
from benchmarks.turns import Clock, run_parts, train_in_turns
from model.network.checkpoint import load_weights, open_checkpoint, read_config, save_model
from model.network.transformer import Llama, ModelConfig, first_weights, num_parameters
from model.network.weights import fill_weights
from model.rlhf.advantages import estimate_advantages, token_rewards, whiten_tokens
from model.rlhf.losses import is_clipped
from model.rlhf.rollouts import Known, Rollout, batch_of_rollouts, policy_loss, token_values, value_loss
from model.rlhf.value import ValueModel, draw_value_head
from model.scoring.reward import RewardModel, open_reward, save_reward
from model.text.dialogue import encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import build_model, start_engine
from tasks.judging.calibration import Line
from tasks.judging.ranking import Scales
from tasks.learning.loop import Progress, note_step
from tasks.ppo.__main__ import VALUE_FROM, take_iteration
from tasks.ppo.experience import Models
from tasks.ppo.training import Params, Training
from tasks.reading.prompts import KINDS, Prompt
from tasks.reading.shares import Asked
from tasks.running.params import Machine
from tasks.running.stage import Stage

CONTEXT, VOCABULARY, BYTES = 256, 2048, 10**9  # tokens, pieces, of a file of weights
MAX_NEW = 48
PROMPTS, STEP_ROWS, SAMPLED_ROWS = 128, 32, 128  # responses of an iteration, of a step, drawn at once
CLIP, VALUE_CLIP, KL, PENALTY, DECAY = 0.2, 0.2, 0.01, 1.0, 0.95
NUM_WARM_UP = 1  # iterations that are not timed
SIZES = {"1M": SAMPLED["default"], "5M": {**PRETRAINED["5M"], "num_key_value_heads": 4}}
ENDS = {"full": -30.0, "any": 4.5}  # logit of EOS, where all others are near 0: never drawn, or after some 30 tokens


def config_of(size: str) -> ModelConfig:
    """Return a model of one of the sizes."""
    return ModelConfig.model_validate(
        {
            **SIZES[size], "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "initializer_range": 0.06, "tie_word_embeddings": False,
        }
    )  # fmt: skip


# --- what both sides start from: a tokenizer, prompts, checkpoints ---


def draw_words(count: int) -> list[str]:
    """Return words of two to four syllables."""
    rng = np.random.default_rng(1)
    syllables = ["".join(pair) for pair in itertools.product("bcdfghklmnprstvz", "aeiou")]
    return ["".join(rng.choice(syllables, size=rng.integers(2, 5))) for _ in range(count)]


def train_tokenizer(directory: Path) -> Tokenizer:
    """Return a tokenizer of such words, of Llama 2's kind."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*draw_words(4000), "[INST] [/INST]"]), model_prefix=str(directory / "tokenizer"),
        vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(directory / "tokenizer.model")


def draw_prompts(count: int, tokenizer: Tokenizer) -> list[Asked]:
    """Return prompts of 20 to 60 tokens, of both kinds."""
    rng, words = np.random.default_rng(2), draw_words(4000)
    prompts: list[Asked] = []
    while len(prompts) < count:
        text = " ".join(rng.choice(words, size=rng.integers(2, 30)))
        prompt = Prompt(str(len(prompts)), "factual", [{"role": "user", "content": text}], None, None, None)
        if 20 <= len(encode_prompt(prompt.messages, tokenizer)) <= 60:
            prompts.append(Asked(KINDS[len(prompts) % len(KINDS)], prompt))
    return prompts


def write_checkpoints(root: Path, size: str, ends: str) -> None:
    """Write a chat model, and a reward model of each kind; the chat model never draws what TRL takes for padding."""
    join_alone()
    config, tokenizer = config_of(size), train_tokenizer(root)
    for seed, kind in enumerate(KINDS):
        generator, reward = torch.Generator().manual_seed(seed), RewardModel(config, "off")
        fill_weights(reward, lambda name, shape: first_weights(name, shape, config, generator))  # noqa: B023
        save_reward(reward, tokenizer, root / kind, {}, BYTES)
    generator, policy = torch.Generator().manual_seed(9), Llama(config, "off")
    fill_weights(policy, lambda name, shape: first_weights(name, shape, config, generator))
    with torch.no_grad():  # all states have a part in common, which these logits look at
        policy.model.embed_tokens.weight += 1.0
        for token, logit in ((tokenizer.eos_id, ENDS[ends]), (tokenizer.unk_id, ENDS["full"])):
            policy.lm_head.weight[token] = logit / config.hidden_size
    save_model(policy, tokenizer, root / "chat", {}, BYTES)


@dataclass(frozen=True)
class Run:
    """A run among others of the same number of iterations."""

    root: Path  # holds the checkpoints
    ends: str  # full: all responses are of MAX_NEW tokens; any: most end before it
    side: str  # here or TRL
    dtype: str  # fp32; bf16 weights, here with float32 masters; or `bf16 autocast`
    rows: int  # responses of a micro batch
    num_iterations: int

    @property
    def name(self) -> str:
        """The run's name in a table."""
        return f"{self.side}, {self.dtype}, {self.rows} rows at once"


Outcome = tuple[list[float], float]  # seconds of each iteration, mean tokens of a response


def train(run: Run, clock: Clock) -> Outcome:
    """Take a run's iterations, in its own process, with the code of its side."""
    length = (train_ours if run.side == "here" else train_theirs)(run, clock)
    return clock.seconds, length


# --- here ---


def params_of(run: Run) -> Params:
    """Return the stage's parameters; what it reads and watches on the way is unused."""
    engine = {**engine_params(run.dtype, 0).model_dump(), "batch_rows": STEP_ROWS, "micro_batch_rows": run.rows}
    schedule = {"learning_rate": 1e-6, "warmup_steps": 2, "final_learning_rate_ratio": 1.0}
    none = dict.fromkeys(KINDS, 1)
    return Params.model_validate(
        {
            **engine, **schedule, "value_learning_rate": 1e-6, "rounds": {"v5": {"init_from": "chat"}},
            "prompts": dict.fromkeys(KINDS, "unused"), "max_prompts": none, "num_held_out_prompts": none,
            "num_rounds": 1, "num_iterations": run.num_iterations, "num_prompts": PROMPTS, "epochs": 1,
            "whitening": "batch", "text": "unused", "text_weight": 0.0, "text_rows": 1,
            "value_warmup_iterations": 0, "clip": CLIP, "value_clip": VALUE_CLIP, "kl_coefficient": KL,
            "missing_eos_penalty": PENALTY, "max_log_odds": 10.0, "discount": 1.0, "decay": DECAY,
            "threshold_precision": 0.89, "max_new_tokens": MAX_NEW, "max_rows": SAMPLED_ROWS, "tokens_at_once": 8192,
            "alarms": {"max_kl": 1e3, "min_entropy": 0.0, "max_length_ratio": 10.0}, "validate_every": 1,
            "patience": 1, "num_shown": 0, "log_every": 1, "save_every": 1, "max_shard_bytes": BYTES,
        }
    )  # fmt: skip


def training_of(run: Run) -> Training:
    """Return what the stage prepares from its files: engines, models, prompts."""
    params, chat, record = params_of(run), run.root / "chat", Path(tempfile.mkdtemp(dir=run.root))
    machine = Machine(threads=2, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    stage = Stage("ppo@v5", params, 1, machine, record, record, record)
    policy = build_model(Llama, read_config(chat), params)
    load_weights(policy, chat)
    value = build_model(ValueModel, read_config(run.root / VALUE_FROM), params)
    load_weights(value, run.root / VALUE_FROM, part="model")
    draw_value_head(value, 1)
    num_steps = run.num_iterations * params.steps_an_iteration
    reference, tokenizer = open_checkpoint(chat, params.precision, CPU)
    directories = {kind: run.root / kind for kind in KINDS}
    rewards = {kind: open_reward(path, params.precision, CPU)[0] for kind, path in directories.items()}
    scales = Scales(Line(1.0, 0.0), Line(1.0, 0.0), 0.5)
    return Training(
        stage, chat, start_engine(policy, params, num_steps), start_engine(value, params, num_steps),
        Models(tokenizer, reference, rewards, directories, scales),
        draw_prompts(run.num_iterations * PROMPTS, tokenizer), [], None,
        Progress({"tokens": 0, "responses": 0}, {"best": {"step": 0}, "first_length": None}),
    )  # fmt: skip


def train_ours(run: Run, clock: Clock) -> float:
    """Take the stage's iterations; return the responses' mean length."""
    join_alone()
    training, lengths = training_of(run), []
    for _ in range(run.num_iterations):
        clock.begin()
        taken = take_iteration(training)
        note_step(training.stage, training.progress, taken)
        lengths.append(taken.found["length"])
    clock.end()
    return statistics.fmean(lengths)


# --- TRL ---


def trainer_of(run: Run, num_prompts: int, epochs: int, step_rows: int, rate: float) -> Any:
    """Return TRL's trainer, with its models, prompts and optimiser; it takes a step for every `step_rows` responses."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    if "autocast" in run.dtype:
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # of our own run, if this process has inherited them
        os.environ.pop(name, None)
    warnings.filterwarnings("ignore", module="transformers")
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        logging,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    chat, scorer = run.root / "chat", run.root / VALUE_FROM
    policy, reference = (AutoModelForCausalLM.from_pretrained(chat, dtype=dtype) for _ in range(2))
    value, reward = (AutoModelForSequenceClassification.from_pretrained(scorer, dtype=dtype) for _ in range(2))
    own = Tokenizer(run.root / "tokenizer.model")
    tokenizer = AutoTokenizer.from_pretrained(chat, padding_side="left", pad_token=own.piece(own.unk_id))
    asked = draw_prompts(run.num_iterations * num_prompts, own)
    weights = [*policy.parameters(), *value.parameters()]
    groups = [
        {"params": [weight for weight in weights if weight.dim() > 1], "weight_decay": 0.1},
        {"params": [weight for weight in weights if weight.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), eps=1e-5, fused=True)
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(dir=run.root), use_cpu=True, bf16=False, gradient_checkpointing=False,
        total_episodes=run.num_iterations * num_prompts, per_device_train_batch_size=run.rows,
        gradient_accumulation_steps=num_prompts // run.rows, num_mini_batches=num_prompts // step_rows,
        num_ppo_epochs=epochs, local_rollout_forward_batch_size=SAMPLED_ROWS, response_length=MAX_NEW,
        stop_token_id=own.eos_id, temperature=1.0, missing_eos_penalty=PENALTY, kl_coef=KL, cliprange=CLIP,
        cliprange_value=VALUE_CLIP, vf_coef=1.0, gamma=1.0, lam=DECAY, num_sample_generations=0, seed=1,
        logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=settings, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        train_dataset=Dataset.from_dict({"input_ids": [encode_prompt(each.prompt.messages, own) for each in asked]}),
    )  # fmt: skip
    trainer.accelerator.gradient_accumulation_steps = step_rows // run.rows
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_theirs(run: Run, clock: Clock) -> float:
    """Take the iterations of TRL's trainer; return the responses' mean length."""
    trainer = trainer_of(run, PROMPTS, 1, STEP_ROWS, 1e-6)
    from transformers import TrainerCallback
    from trl.experimental.ppo import ppo_trainer

    truncate, lengths = ppo_trainer.truncate_response, []

    def counted(stop: int, padding: int, responses: torch.Tensor) -> torch.Tensor:
        truncated = truncate(stop, padding, responses)
        lengths.append(float((truncated != padding).sum()))
        return truncated

    ppo_trainer.truncate_response = counted

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            (clock.end if state.global_step == run.num_iterations else clock.begin)()

    trainer.add_callback(Watch())
    with redirect_stdout(io.StringIO()):
        trainer.train()
    return sum(lengths) / (run.num_iterations * PROMPTS)


# --- what TRL computes, against what we do ---


class Caught(NamedTuple):
    """A step of TRL's trainer: its loop's variables, and the weights and gradients of both models."""

    seen: Mapping[str, Any]
    weights: Mapping[str, torch.Tensor]
    gradients: Mapping[str, torch.Tensor]


def catch_steps(run: Run, num_prompts: int) -> list[Caught]:
    """Take two epochs over an iteration's responses with TRL's trainer, and catch every step."""
    trainer = trainer_of(run, num_prompts, 2, run.rows, 5e-4)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # so that there is a KL
        for weight in trainer.ref_model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    backward, caught = trainer.accelerator.backward, []

    def catching(loss: torch.Tensor) -> None:
        loop = inspect.currentframe().f_back.f_locals  # type: ignore[union-attr]
        seen = {name: each.detach().clone() for name, each in loop.items() if isinstance(each, torch.Tensor)}
        parts = {"policy": trainer.model.policy, "value": trainer.model.value_model}
        named = {f"{part}.{name}": own for part, model in parts.items() for name, own in model.named_parameters()}
        weights = {name: own.detach().clone() for name, own in named.items()}
        backward(loss)
        numbers = {"rows": loop["micro_batch_inds"], "context": loop["context_length"]}
        caught.append(Caught({**seen, **numbers}, weights, {name: own.grad.clone() for name, own in named.items()}))

    trainer.accelerator.backward = catching
    with redirect_stdout(io.StringIO()):
        trainer.train()
    return caught


def our_models(weights: Mapping[str, torch.Tensor], config: ModelConfig) -> tuple[Llama, ValueModel]:
    """Return our policy and value model with TRL's weights."""
    policy, value = Llama(config, "off"), ValueModel(config, "off")
    policy.load_state_dict(own_part(weights, "policy."))
    value.load_state_dict(own_part(weights, "value."))
    return policy, value


def own_part(named: Mapping[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    """Return a model's tensors by our names: the value model's head has another one."""
    own = {name.removeprefix(part): each for name, each in named.items() if name.startswith(part)}
    return {name.replace("score.", "value.") if part == "value." else name: each for name, each in own.items()}


def rollouts_of(seen: Mapping[str, Any], rows: Sequence[int], is_token: torch.Tensor, padding: int) -> list[Rollout]:
    """Return responses, each up to where the mask (all rows, L) ends, with their prompts."""
    prompts = [seen["queries"][row] for row in rows]
    return [
        Rollout(prompt[prompt != padding].tolist(), seen["responses"][row][is_token[row]].tolist())
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def known_of(seen: Mapping[str, Any], rows: Sequence[int], is_token: torch.Tensor) -> list[Known]:
    """Return what TRL knows of the same tokens."""
    names = ("logprobs", "values", "advantages", "returns")
    return [Known(*(seen[name][row][is_token[row]] for name in names)) for row in rows]


def step_differences(step: Caught, config: ModelConfig, padding: int) -> list[float]:
    """Return TRL's losses of a step, how far ours are from them, and from the gradients; then the clipped shares.

    Order: policy loss, difference, value loss, difference, relative difference of all gradients, share of tokens whose
    policy loss is clipped, share whose value is beyond the clip.
    """
    seen, rows = step.seen, step.seen["rows"].tolist()
    policy, value = our_models(step.weights, config)
    is_token, has_value = ~seen["padding_mask"], ~seen["padding_mask_p1"]
    batch, longer = (
        batch_of_rollouts(rollouts_of(seen, rows, mask, padding), known_of(seen, rows, mask), CPU)
        for mask in (is_token, has_value)
    )
    summed, log_probabilities = policy_loss(policy, batch, CLIP)
    ours = summed / batch.is_target.sum(), value_loss(value, longer, VALUE_CLIP) / longer.is_target.sum()
    sum(ours).backward()
    theirs = own_part(step.gradients, "policy."), own_part(step.gradients, "value.")
    pairs = [
        (parameter.grad, gradients[name])
        for model, gradients in zip((policy, value), theirs, strict=True)
        for name, parameter in model.named_parameters()
    ]
    apart = torch.stack([(one - other).norm() for one, other in pairs]).norm()
    clipped = is_clipped(log_probabilities, batch.known[0], batch.known[2], CLIP)[batch.is_target]
    moved = (token_values(value, longer) - longer.known[1])[longer.is_target].abs() > VALUE_CLIP
    losses = float(seen["pg_loss"]), float(seen["vf_loss"])
    found = [(their, abs(float(own.detach()) - their)) for own, their in zip(ours, losses, strict=True)]
    relative = float(apart / torch.stack([other.norm() for _, other in pairs]).norm())
    return [*found[0], *found[1], relative, float(clipped.float().mean()), float(moved.float().mean())]


def earlier_differences(step: Caught, config: ModelConfig, padding: int) -> list[float]:
    """Return how far we are from what TRL knew before its first step: the greatest difference of any token.

    Order: log-probabilities, values, returns, whitened advantages.
    """
    seen, rows = step.seen, range(len(step.seen["responses"]))
    policy, value = our_models(step.weights, config)
    is_token, has_value = ~seen["padding_mask"], ~seen["padding_mask_p1"]
    batch, longer = (
        batch_of_rollouts(rollouts_of(seen, rows, mask, padding), known_of(seen, rows, mask), CPU)
        for mask in (is_token, has_value)
    )
    with torch.no_grad():
        log_probabilities = policy_loss(policy, batch, CLIP)[1]
        values = token_values(value, longer)
    log_ratios = seen["logprobs"] - seen["ref_logprobs"]
    rewards = token_rewards(seen["scores"], log_ratios, has_value, KL)
    advantages = estimate_advantages(rewards, seen["values"], has_value, 1.0, DECAY)
    returns = advantages + seen["values"]
    num_tokens = int(is_token.sum())
    whitened = whiten_tokens(advantages * is_token, is_token) * math.sqrt((num_tokens - 1) / num_tokens)
    return [
        float((one - other).abs().max())
        for one, other in (
            (log_probabilities, batch.known[0]),
            (values, longer.known[1]),
            (returns[has_value], seen["returns"][has_value]),
            (whitened[is_token], seen["advantages"][is_token]),
        )
    ]


def compare_with_caught(run: Run, clock: Clock) -> tuple[list[float], list[list[float]]]:
    """Take TRL's steps, in its own process; return the differences before the first one, and those of each."""
    clock.begin()
    steps, config = catch_steps(run, 2 * run.rows), read_config(run.root / "chat")
    padding = Tokenizer(run.root / "tokenizer.model").unk_id
    clock.end()
    return earlier_differences(steps[0], config, padding), [step_differences(step, config, padding) for step in steps]


# --- the parts ---


def compare_losses() -> None:
    """Print TRL's losses of each step, and how far ours are from them in float32."""
    head = "| responses | step | policy loss | difference | value loss | difference | gradients, relative | clipped |"
    print(f"{head} values clipped |\n" + "| --- " * 9 + "|")
    earlier = {}
    for ends in ENDS:
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoints(Path(directory), "1M", ends)
            run = Run(Path(directory), ends, "TRL", "fp32", 16, 1)
            ((earlier[ends], steps),) = train_in_turns(compare_with_caught, [run])
        for number, (policy, apart, value, value_apart, gradients, clipped, moved) in enumerate(steps, start=1):
            print(
                f"| {ends} | {number} | {policy:.5f} | {apart:.1e} | {value:.5f} | {value_apart:.1e} "
                f"| {gradients:.1e} | {clipped:.0%} | {moved:.0%} |"
            )
    print("\n| responses | log-probabilities | values | returns | whitened advantages |\n" + "| --- " * 5 + "|")
    for ends, differences in earlier.items():
        print(f"| {ends} | " + " | ".join(f"{difference:.1e}" for difference in differences) + " |")


def compare_speed() -> None:
    """Print responses per second of whole iterations; the ratio is how much faster we are."""
    print("| parameters | responses | run | tokens | s per iteration | responses/s | ratio |\n" + "| --- " * 7 + "|")
    for size, ends in (("1M", "full"), ("1M", "any"), ("5M", "any")):
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoints(Path(directory), size, ends)
            settings = [("here", "fp32", STEP_ROWS), *(("TRL", "fp32", rows) for rows in (STEP_ROWS, 8))]
            settings += [("here", "bf16", STEP_ROWS)]
            settings += [("TRL", dtype, STEP_ROWS) for dtype in ("bf16", "bf16 autocast")]
            runs = [Run(Path(directory), ends, *setting, num_iterations=4) for setting in settings]
            outcomes = train_in_turns(train, runs)
        steady = [statistics.median(seconds[NUM_WARM_UP:]) for seconds, _ in outcomes]
        ours = {run.dtype: seconds for run, seconds in zip(runs, steady, strict=True) if run.side == "here"}
        for run, seconds, (_, length) in zip(runs, steady, outcomes, strict=True):
            ratio = "" if run.side == "here" else f"{seconds / ours[run.dtype.split()[0]]:.2f}"
            print(
                f"| {num_parameters(config_of(size)):,} | {ends} | {run.name} | {length:.1f} | {seconds:.2f} "
                f"| {PROMPTS / seconds:.1f} | {ratio} |",
                flush=True,
            )


PARTS: dict[str, Callable[[], None]] = {"loss": compare_losses, "speed": compare_speed}


if __name__ == "__main__":
    run_parts(PARTS, "trl")
