"""Training by DeepSpeed: a model and its parameters -> an engine, its steps, and the state it resumes from.

The only place that calls `deepspeed.initialize`. What is DeepSpeed's: ranks, ZeRO, precision, accumulation, clipping,
the schedule. What is ours: losses averaged over tokens or pairs whatever their number in a micro batch or on a rank, an
update that can be refused once its loss and gradient norm are known, and a state on disk that is whole or not there.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import logging
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from model.packing import Batch
from model.transformer import Checkpointing, Llama, ModelConfig, first_weights


@contextmanager
def _quietly() -> Iterator[None]:
    """Import DeepSpeed without its remark on machines that have no GPU, and without MLflow.

    Its autotuner, unused here, imports MLflow where it can, which takes two seconds.
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
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

NUM_STATES_KEPT = 2

ModelType = TypeVar("ModelType", bound=nn.Module)
BatchType = TypeVar("BatchType")
Part = TypeVar("Part")


class EngineParams(BaseModel):
    """How a model is trained, whatever the task."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        description="what ranks share out: 0 nothing, 1 optimiser state, 2 and gradients, 3 and weights"
    )
    precision: Literal["fp32", "bf16"] = Field(description="weights and products; bf16 keeps float32 master weights")
    offload: Literal["none", "cpu"] = Field(description="where the optimiser state of a GPU's rank lives")
    activation_checkpointing: Checkpointing = Field(
        description="off keeps all activations, selective only matrix products', full only each layer's input"
    )
    batch_rows: int = Field(gt=0, description="rows of one optimiser step, over all ranks; a row is a sequence")
    micro_batch_rows: int = Field(gt=0, description="rows that one rank holds at once")
    learning_rate: float = Field(gt=0, description="peak of the schedule")
    final_learning_rate_ratio: float = Field(ge=0, le=1, description="share of the peak that the cosine ends at")
    warmup_steps: int = Field(gt=1, description="steps of linear warm-up at least")
    warmup_ratio: float = Field(ge=0, lt=1, description="share of all steps that warm up, if that is more")
    beta1: float = Field(ge=0, lt=1, description="AdamW: decay of the gradient's mean")
    beta2: float = Field(ge=0, lt=1, description="AdamW: decay of the gradient's mean square")
    epsilon: float = Field(gt=0, description="AdamW: added to the root of the mean square")
    weight_decay: float = Field(ge=0, description="AdamW: decay of matrices; norms have none")
    gradient_clipping: float = Field(gt=0, description="greatest norm of the gradient")

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3: stage 0 keeps the optimiser state beside the weights")
        return self


@dataclass(frozen=True)
class Step:
    """What one optimiser step found: its mean loss, the gradient's norm before clipping, its rate."""

    loss: float
    gradient_norm: float
    learning_rate: float
    updated: bool  # false: the update was refused


class RefusableAdamW(torch.optim.AdamW):
    """AdamW that asks before it updates.

    Every ZeRO stage knows the gradient's norm before it calls its inner optimiser, and nothing has changed by then:
    this is the one place where an update can be left out in all of them. It refuses until told otherwise, so that
    DeepSpeed's own first call, which only allocates state, doesn't count as a step.
    """

    accepts: Callable[[], bool] = staticmethod(lambda: False)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights, if accepted."""
        if self.accepts():
            super().step(closure)


class StateFiles(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's way to disk, without its trust in pickle: only tensors and plain values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[Path] = []

    def create(self, info: object) -> None:
        """Begin a checkpoint."""
        self.written.clear()

    def save(self, state_dict: object, path: str) -> None:
        """Write one file."""
        torch.save(_without_enums(state_dict), path)
        self.written.append(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""
        with torch.serialization.safe_globals([LossScaler, fragment_address]):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: object) -> bool:
        """End a checkpoint."""
        return True


def _without_enums(value: Any) -> Any:
    """Return a state with numbers in place of enumerations, which Python before 3.11.4 pickles as calls of getattr."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(part) for key, part in value.items()}
    return value


def join_ranks() -> torch.device:
    """Join this run's processes, as DeepSpeed's launcher's environment names them; return this one's device."""
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # None of DeepSpeed's own operations is used; looking which ones it could build starts compilers.
    deepspeed.ops.__compatible_ops__ = {}
    gc.freeze()  # DeepSpeed collects garbage again and again while it starts; what was imported is none
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(torch.distributed.get_node_local_rank())
    return torch.device(accelerator.current_device_name())


def from_all_ranks(own: Mapping[int, Part]) -> list[Part]:
    """Return, on every rank, what the ranks have each done for some of the numbers from 0 on, in these' order."""
    parts: list[Mapping[int, Part]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, own)
    together = {number: found for part in parts for number, found in part.items()}
    return [together[number] for number in range(len(together))]


def num_micro_batches(params: EngineParams, num_ranks: int) -> int:
    """Return how many micro batches each rank adds up for one step.

    Raises ValueError when micro batches on all ranks don't make up the batch.
    """
    together = params.micro_batch_rows * num_ranks
    if params.batch_rows % together:
        raise ValueError(
            f"params.yaml: `batch_rows` {params.batch_rows} is no multiple of `micro_batch_rows` "
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
                "total_num_steps": num_steps + 1,  # the cosine then ends at the last step, not before it
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


def build_model(
    kind: Callable[[ModelConfig, Checkpointing], ModelType], config: ModelConfig, params: EngineParams
) -> ModelType:
    """Return a model of a kind without weights yet; under ZeRO 3 no rank ever holds all of it."""
    num_ranks = torch.distributed.get_world_size()
    shards = {
        "train_batch_size": num_ranks,
        "bf16": {"enabled": params.precision == "bf16"},
        "zero_optimization": {"stage": params.zero_stage},
    }
    with deepspeed.zero.Init(config_dict_or_path=shards, enabled=params.zero_stage == 3):
        return kind(config, params.activation_checkpointing)


def shape_of(parameter: Tensor) -> torch.Size:
    """Return a weight's shape, shared out or not."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def whole(parameter: Tensor, changed: bool) -> AbstractContextManager[None]:
    """Hold a weight that the ranks share out as a whole on each, and give them what rank 0 changed in it."""
    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(
        [parameter], modifier_rank=0 if changed else None
    )
    return gathered


def fill_weights(model: nn.Module, value_of: Callable[[str, torch.Size], Tensor]) -> None:
    """Set each weight to what `value_of` returns for its name and shape; all ranks call, rank 0's values count.

    Weights come one at a time, in the model's order: one that the ranks share out is whole only for a moment. Others
    reach the other ranks when the engine starts.
    """
    for name, parameter in model.named_parameters():
        shape = shape_of(parameter)
        with whole(parameter, changed=True), torch.no_grad():
            if torch.distributed.get_rank() == 0:
                parameter.copy_(value_of(name, shape))


def draw_weights(model: Llama, seed: int) -> None:
    """Give a model its first weights, the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    fill_weights(model, lambda name, shape: first_weights(name, shape, model.config, generator))


def start_engine(model: nn.Module, params: EngineParams, num_steps: int) -> Any:
    """Return DeepSpeed's engine around a model whose weights are set.

    Raises ValueError when the batch doesn't divide, or the warm-up is longer than the training.
    """
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
    engine.lr_scheduler.step(1)  # from 0 on, as DeepSpeed begins, the first two steps would train nothing
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

    `loss_of` returns a micro batch's summed loss, given the engine; `count` says over how many, predicted tokens for
    instance, the micro batches of all ranks sum it: the loss is their mean.
    `accepts` is asked, with the loss and the gradient's norm, whether to update; every rank asks with the same values.
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
    norm, updated = answers[0] if answers else (math.inf, False)  # DeepSpeed itself leaves out what is not finite
    return Step(mean_loss, norm, learning_rate, updated)


def _gradient_norm(module: torch.nn.Module) -> float:
    """Norm of all gradients; only plain float32 without ZeRO keeps it to itself."""
    return float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]))


def save_state(engine: Any, directory: Path, step: int, progress: Mapping[str, Any]) -> None:
    """Write all that training goes on from into `directory`/step-<step>, and drop all but the newest states.

    The files get their final place in one rename after their digests are noted: a state is whole or not there.
    """
    rank = torch.distributed.get_rank()
    temporary = directory / ".partial"
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
    torch.distributed.barrier()
    engine.save_checkpoint(str(directory), tag=temporary.name, save_latest=False)
    mine = {path.name: _digest(path) for path in engine.checkpoint_engine.written}
    all_digests: list[dict[str, str]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(all_digests, mine)
    if rank == 0:
        files = {name: digest for digests in all_digests for name, digest in digests.items()}
        manifest = {"step": step, "num_ranks": len(all_digests), "files": files, "progress": progress}
        (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        temporary.rename(_state(directory, step))
        for old in _states(directory)[:-NUM_STATES_KEPT]:
            shutil.rmtree(_state(directory, old))
    torch.distributed.barrier()


def load_state(engine: Any, directory: Path) -> tuple[int, dict[str, Any]] | None:
    """Bring an engine to the newest state in `directory`; return its step and progress, or None if there is none.

    Raises ValueError, naming the file and what to do, for a damaged state or one of another number of ranks.
    """
    states = _states(directory)
    if not states:
        return None
    state = _state(directory, states[-1])
    before = f"`{_state(directory, states[-2])}`" if len(states) > 1 else "the beginning"
    remedy = f"delete `{state}` to go on from {before}"
    try:
        manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
        step, num_ranks, files, progress = (manifest[key] for key in ("step", "num_ranks", "files", "progress"))
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{state / 'manifest.json'} is missing or damaged: {remedy}") from None
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if num_ranks != world:
        raise ValueError(
            f"{state} was written by {num_ranks} ranks, and this run has {world}: "
            f"set `machine.num_ranks` back, or delete `{directory}` to begin anew"
        )
    for name in sorted(files)[rank::world]:
        path = state / name
        if not path.is_file():
            raise ValueError(f"{path} is missing: {remedy}")
        if _digest(path) != files[name]:
            raise ValueError(f"{path} is damaged (its digest is not the one noted when it was written): {remedy}")
    torch.distributed.barrier()
    with redirect_stdout(io.StringIO()):
        engine.load_checkpoint(str(directory), tag=state.name)
    return step, progress


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(directory: Path, step: int) -> Path:
    return directory / f"step-{step}"


def _states(directory: Path) -> list[int]:
    """Steps of the whole states in a directory, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


@contextmanager
def evaluating(engine: Any) -> Iterator[None]:
    """Run the model without training it."""
    engine.eval()
    with torch.no_grad():
        yield
    engine.train()


@contextmanager
def gathered(engine: Any) -> Iterator[Llama]:
    """Hold the engine's model as a plain one to sample with, whole on every rank; all ranks enter and leave together.

    Weights that the ranks share out are gathered once, not layer by layer for each token, and given back at the end;
    others are the engine's own (Llama 2, section 3.2.3: sampling under sharded training took twenty times as long).
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
