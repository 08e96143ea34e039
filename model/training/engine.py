"""Training with DeepSpeed: turn a model and its parameters into an engine, and take its steps.

The only place that calls `deepspeed.initialize`. DeepSpeed handles ranks, ZeRO, precision, accumulation, clipping and
the schedule. We average the loss over all tokens or pairs, however they are spread over micro batches and ranks; we can
refuse an update once its loss and gradient norm are known; and we write the files of the states (states.py).
"""

from __future__ import annotations

import gc
import io
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from model.network.packing import Batch
from model.network.transformer import Checkpointing, Llama, ModelConfig, first_weights
from model.network.weights import fill_weights, shape_of


@contextmanager
def _quietly() -> Iterator[None]:
    """Import DeepSpeed without its warning on machines that have no GPU, and without MLflow.

    Its autotuner, unused here, imports MLflow if it is installed, which takes two seconds.
    """
    absent = "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    if absent:
        del sys.modules["mlflow"]


with _quietly():
    import deepspeed

    from model.training.states import StateFiles

ModelType = TypeVar("ModelType", bound=nn.Module)
BatchType = TypeVar("BatchType")


class EngineParams(BaseModel):
    """How a model is trained, whatever the task."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        description="what is sharded over ranks: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights"
    )
    precision: Literal["fp32", "bf16"] = Field(description="weights and products; bf16 keeps float32 master weights")
    offload: Literal["none", "cpu"] = Field(description="where a GPU rank keeps its optimiser state")
    activation_checkpointing: Checkpointing = Field(
        description="off keeps all activations, selective only outputs of matrix products, full only each layer's input"
    )
    batch_rows: int = Field(gt=0, description="rows of one optimiser step, over all ranks; a row is a sequence")
    micro_batch_rows: int = Field(gt=0, description="rows that one rank processes at once")
    learning_rate: float = Field(gt=0, description="peak of the schedule")
    final_learning_rate_ratio: float = Field(ge=0, le=1, description="share of the peak that the cosine ends at")
    warmup_steps: int = Field(gt=1, description="minimum number of linear warm-up steps")
    warmup_ratio: float = Field(ge=0, lt=1, description="warm-up as a share of all steps, if that is more")
    beta1: float = Field(ge=0, lt=1, description="AdamW: decay of the gradient's mean")
    beta2: float = Field(ge=0, lt=1, description="AdamW: decay of the gradient's mean square")
    epsilon: float = Field(gt=0, description="AdamW: added to the root of the mean square")
    weight_decay: float = Field(ge=0, description="AdamW: decay of matrices; norms have none")
    gradient_clipping: float = Field(gt=0, description="maximum norm of the gradient")

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: stage 0 keeps the optimiser state beside the weights")
        return self


@dataclass(frozen=True)
class Step:
    """The outcome of one optimiser step: its mean loss, the gradient norm before clipping, its learning rate."""

    loss: float
    gradient_norm: float
    learning_rate: float
    updated: bool  # false: the update was refused


class RefusableAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates.

    Every ZeRO stage knows the gradient norm before it calls its inner optimiser, and has changed nothing by then: this
    is the one place where all of them can skip an update. It refuses until told otherwise, so that DeepSpeed's own
    first call, which only allocates state, doesn't count as a step.
    """

    accepts: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights, if accepted."""
        if self.accepts():
            super().step(closure)


def num_micro_batches(params: EngineParams, num_ranks: int) -> int:
    """Return how many micro batches each rank accumulates for one step.

    Raises ValueError when the batch does not divide into micro batches on all ranks.
    """
    together = params.micro_batch_rows * num_ranks
    if params.batch_rows % together:
        raise ValueError(
            f"params.yaml: `batch_rows` {params.batch_rows} is not a multiple of `micro_batch_rows` "
            f"{params.micro_batch_rows} x {num_ranks} ranks = {together}: change one of the three"
        )
    return params.batch_rows // together


def deepspeed_config(params: EngineParams, num_ranks: int, num_steps: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration."""
    num_micro = num_micro_batches(params, num_ranks)
    warmup_steps = max(params.warmup_steps, math.ceil(params.warmup_ratio * num_steps))
    if warmup_steps >= num_steps:
        raise ValueError(
            f"params.yaml: a warm-up of {warmup_steps} (`warmup_steps`, `warmup_ratio`) leaves none of {num_steps} "
            "steps to train: lower it, or give more data or a smaller `batch_rows`"
        )
    config: dict[str, Any] = {
        "train_batch_size": params.batch_rows,
        "train_micro_batch_size_per_gpu": params.micro_batch_rows,
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": params.gradient_clipping,
        "steps_per_print": None,
        "bf16": {"enabled": params.precision == "bf16"},
        "zero_optimization": {"stage": params.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": num_steps + 1,  # so that the cosine ends at the last step, not before it
                "warmup_num_steps": warmup_steps,
                "warmup_type": "linear",
                "cos_min_ratio": params.final_learning_rate_ratio,
            },
        },
    }
    if params.precision == "bf16" and params.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    if params.offload == "cpu":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    return config


def _prepare_deepspeed() -> None:
    """Make DeepSpeed use the ranks that have joined; a second call changes nothing."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # None of DeepSpeed's own operations is used; checking which ones it could build starts compilers.
    deepspeed.ops.__compatible_ops__ = {}
    gc.freeze()  # DeepSpeed runs the garbage collector repeatedly as it starts: it need not scan what is imported
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def build_model(
    kind: Callable[[ModelConfig, Checkpointing], ModelType], config: ModelConfig, params: EngineParams
) -> ModelType:
    """Return a model of a kind, its weights not yet set; under ZeRO 3 no rank ever holds all of it."""
    _prepare_deepspeed()
    num_ranks = torch.distributed.get_world_size()
    shards = {
        "train_batch_size": num_ranks,
        "bf16": {"enabled": params.precision == "bf16"},
        "zero_optimization": {"stage": params.zero_stage},
    }
    with deepspeed.zero.Init(config_dict_or_path=shards, enabled=params.zero_stage == 3):
        return kind(config, params.activation_checkpointing)


def draw_weights(model: Llama, seed: int) -> None:
    """Initialise a model's weights, identically on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    fill_weights(model, lambda name, shape: first_weights(name, shape, model.config, generator))


def start_engine(model: nn.Module, params: EngineParams, num_steps: int) -> Any:
    """Return DeepSpeed's engine around a model whose weights are set.

    Raises ValueError when the batch doesn't divide, or the warm-up leaves no step to train.
    """
    _prepare_deepspeed()
    num_ranks = torch.distributed.get_world_size()
    config = deepspeed_config(params, num_ranks, num_steps)
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if len(shape_of(w)) > 1], "weight_decay": params.weight_decay},
        {"params": [w for w in weights if len(shape_of(w)) == 1], "weight_decay": 0.0},
    ]
    optimizer = RefusableAdamW(
        groups, lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.epsilon, fused=True
    )
    with redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.checkpoint_engine = StateFiles()
    engine.lr_scheduler.step(1)  # from 0, where DeepSpeed begins, the first two steps would train nothing
    return engine


def token_loss(engine: Any, batch: Batch) -> Tensor:
    """Return the sum of the losses of a batch's tokens, in nats."""
    losses_T: Tensor = engine(batch.ids, batch.documents, batch.targets)
    return losses_T.sum()


def train_step(
    engine: Any,
    batches: Sequence[BatchType],
    loss_of: Callable[[Any, BatchType], Tensor],
    count: int,
    accepts: Callable[[float, float], bool],
) -> Step:
    """Take one optimiser step over this rank's micro batches.

    `loss_of` returns a micro batch's summed loss, given the engine. `count` is the number of terms (predicted tokens,
    for instance) that the micro batches of all ranks sum over: the loss is their mean.
    `accepts` decides from the loss and the gradient norm whether to update; every rank passes it the same values.
    """
    num_ranks = torch.distributed.get_world_size()
    total = torch.zeros((), device=engine.device)
    for number, batch in enumerate(batches, start=1):
        loss = loss_of(engine, batch) / count
        engine.backward(loss * num_ranks, scale_wrt_gas=False)  # the ranks' gradients are averaged
        total += loss.detach()
        if number < len(batches):
            engine.step()
    torch.distributed.all_reduce(total)
    mean_loss = float(total)
    plain = engine.optimizer is engine.basic_optimizer
    norm_before = _gradient_norm(engine.module) if plain else math.nan
    answers: list[tuple[float, bool]] = []

    def asked() -> bool:
        if not answers:
            norm = norm_before if plain else float(engine.optimizer._global_grad_norm)
            answers.append((norm, accepts(mean_loss, norm)))
        return answers[0][1]

    learning_rate = float(engine.get_lr()[0])
    engine.basic_optimizer.accepts = asked
    engine.step()
    norm, updated = answers[0] if answers else (math.inf, False)  # DeepSpeed itself skips updates that are not finite
    return Step(mean_loss, norm, learning_rate, updated)


def _gradient_norm(module: torch.nn.Module) -> float:
    """Return the norm of all gradients; only plain float32 without ZeRO does not report it."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Run the model without training it, for as long as the block lasts."""
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()


@contextmanager
def gathered(engine: Any) -> Iterator[Llama]:
    """Yield the engine's model as a plain one to sample with, whole on every rank; all ranks enter and leave together.

    Sharded weights are gathered once, not layer by layer for each token, and released at the end; others are the
    engine's own (Llama 2, section 3.2.3: sampling under sharded training took twenty times as long).
    """
    weights = dict(engine.module.named_parameters(remove_duplicate=False))
    with torch.device("meta"):
        model = Llama(engine.module.config, "off").eval()
    shared = list(engine.module.parameters())
    with (
        deepspeed.zero.GatheredParameters(shared, enabled=engine.zero_optimization_partition_weights()),
        torch.no_grad(),
    ):
        model.load_state_dict(weights, assign=True)
        yield model
