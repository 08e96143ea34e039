"""What PPO is told in params.yaml, and what one run of it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.training.engine import EngineParams
from tasks.learning.loop import Progress
from tasks.learning.stream import Text
from tasks.ppo.alarms import Alarms
from tasks.ppo.experience import Drawing, Models
from tasks.reading.prompts import KINDS
from tasks.reading.shares import Asked as AskedPrompt
from tasks.reading.shares import Numbers
from tasks.reading.taking import Asking
from tasks.running.params import Section
from tasks.running.stage import Stage


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
