"""Checkpoints: Hugging Face Llama directories, written completely or not at all, read whoever wrote them.

A directory holds config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json),
the tokenizer's files and training.json. transformers, vLLM and llama.cpp open it as it is. Pickled weights are never
read.

Another kind of model defines its weights and its config.json in its own module: model/scoring/reward.py.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

from model.network.transformer import Checkpointing, Llama, ModelConfig, Network
from model.network.weights import fill_weights, shape_of, whole
from model.text.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHAT_FIELDS = {"architectures": ["LlamaForCausalLM"]}
REWARD_ARCHITECTURE = "LlamaForSequenceClassification"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BUILT_IN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

NetworkType = TypeVar("NetworkType", bound=Network)


def save_model(
    model: Network,
    tokenizer: Tokenizer,
    directory: Path,
    training: Mapping[str, Any],
    max_shard_bytes: int,
    fields: Mapping[str, Any] = CHAT_FIELDS,
    apart: Mapping[str, str] | None = None,
) -> None:
    """Write a model's checkpoint into `directory`, which is new or empty; all ranks call, rank 0 writes.

    Weights are gathered one by one, and rank 0 holds one shard at a time. `training` goes into training.json; `fields`,
    which describe the kind of model, go into config.json. `apart` names a separate file for each weight that the
    architecture in `fields` has no place for.
    """
    weights = _gathered(model)
    apart = apart or {}
    if torch.distributed.get_rank() == 0:
        sizes = {name: shape_of(weight).numel() * weight.element_size() for name, weight in model.named_parameters()}
        files = _plan_shards({name: size for name, size in sizes.items() if name not in apart}, max_shard_bytes)
        write_checkpoint(model.config, weights, files, tokenizer, directory, training, fields, apart)
    else:
        for _ in weights:
            pass
    torch.distributed.barrier()


def _gathered(model: Network) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight with its name, gathered only until the next one is requested."""
    for name, parameter in model.named_parameters():
        with whole(parameter, changed=False):
            yield name, parameter.detach()


def write_checkpoint(
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    files: Mapping[str, str],
    tokenizer: Tokenizer,
    directory: Path,
    training: Mapping[str, Any],
    fields: Mapping[str, Any],
    apart: Mapping[str, str],
) -> None:
    """Write a checkpoint, one weight at a time; `files` names the file of each, the rest is as in `save_model`."""
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    left = Counter([*files.values(), *apart.values()])
    shard: dict[str, Tensor] = {}
    num_bytes, dtype = 0, ""
    for name, weight in weights:
        shard[name] = weight.to("cpu", copy=True)
        num_bytes += 0 if name in apart else weight.nbytes
        dtype = str(weight.dtype).removeprefix("torch.")
        file = apart.get(name) or files[name]
        left[file] -= 1
        if not left[file]:
            save_file(shard, temporary / file, metadata={"format": "pt"})
            shard.clear()
    if WEIGHTS not in left:
        _write_json(temporary / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": dict(files)})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    fixed = {**fields, "torch_dtype": dtype, **BUILT_IN, **ids}
    _write_json(temporary / "config.json", {**fixed, **config.model_dump()})
    _write_json(temporary / "generation_config.json", ids)
    _write_json(temporary / "training.json", dict(training))
    tokenizer.save(temporary)
    temporary.replace(directory)


def _plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, str]:
    """Return the file of each weight, given its bytes: shards are filled in order, up to the maximum size."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, size in sizes.items():
        if filled and filled + size > max_shard_bytes:
            number, filled = number + 1, 0
        filled += size
        numbers[name] = number
    if number == 1:
        return dict.fromkeys(numbers, WEIGHTS)
    return {name: f"model-{shard:05d}-of-{number:05d}.safetensors" for name, shard in numbers.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(directory: Path) -> ModelConfig:
    """Return the model that a Hugging Face Llama directory describes.

    Raises ValueError, naming the file, when config.json is missing, damaged, or describes a model we can't build.
    """
    path = directory / "config.json"
    values = _read_json(path)
    rope = {**(values.pop("rope_scaling", None) or {}), **(values.pop("rope_parameters", None) or {})}
    kind = rope.pop("type", "default")  # the key's name before transformers 4.43
    kind = rope.setdefault("rope_type", kind)
    found = {**BUILT_IN, **values}
    wrong = [f"{key} {found[key]!r} (not {value!r})" for key, value in BUILT_IN.items() if found[key] != value]
    wrong += [f"rope_type {kind!r} (not 'default' or 'llama3')"] if kind not in ("default", "llama3") else []
    if not wrong:
        theta = values.get("rope_theta", 10000.0)  # transformers omits Llama 2's own value
        values["rope_theta"] = rope.pop("rope_theta", theta)
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        if kind == "llama3":
            rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
            values["rope_scaling"] = rope
        config = config_of({key: values.get(key) for key in ModelConfig.model_fields}, path)
        if values.get("head_dim") in (None, config.head_size):
            return config
        wrong = [f"head_dim {values['head_dim']} (not hidden_size / num_attention_heads = {config.head_size})"]
    raise ValueError(f"{path} describes no Llama model that this code can build: it has {', '.join(wrong)}")


def config_of(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """Return the model that values describe. Raises ValueError, naming the file they come from, if they are wrong."""
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        details = "; ".join(
            f"{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" if e["loc"] else e["msg"]
            for e in error.errors()
        )
        raise ValueError(f"{path} describes no Llama model that this code can build: {details}") from None


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of a Hugging Face Llama directory.

    Raises ValueError when it is missing, not of Llama 2's kind, or belongs to another model.
    """
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").exists() and not path.exists():
        raise ValueError(
            f"{directory} has a tokenizer.json but no tokenizer.model: a SentencePiece model, as Llama 2 has, is "
            "needed; a model with another tokenizer, such as Llama 3, can't be used"
        )
    tokenizer = Tokenizer(path)
    check_fit(tokenizer, config, directory / "config.json")
    return tokenizer


def check_fit(tokenizer: Tokenizer, config: ModelConfig, model: Path) -> None:
    """Raise ValueError when a tokenizer's vocabulary size differs from that of the model that `model` describes."""
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, and {model} describes a model of "
            f"{config.vocab_size} (`vocab_size`): use the tokenizer that the model was trained with"
        )


def is_reward_model(directory: Path) -> bool:
    """Return whether a Hugging Face Llama directory holds a reward model."""
    return REWARD_ARCHITECTURE in (_read_json(directory / "config.json").get("architectures") or [])


def open_checkpoint(
    directory: Path, precision: Literal["fp32", "bf16"], device: torch.device
) -> tuple[Llama, Tokenizer]:
    """Return the model and the tokenizer of a Hugging Face Llama directory; if there are several ranks, all call.

    Raises ValueError as this module's readers do, and for a reward model, which only scores.
    """
    if is_reward_model(directory):
        raise ValueError(f"{directory} is a reward model, which only scores answers: name a chat model")
    return open_model(Llama, directory, precision, device)


def open_model(
    kind: Callable[[ModelConfig, Checkpointing], NetworkType],
    directory: Path,
    precision: Literal["fp32", "bf16"],
    device: torch.device,
) -> tuple[NetworkType, Tokenizer]:
    """Return a directory's model of a kind, for inference, whole on each rank, and its tokenizer."""
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    if not torch.distributed.is_initialized():  # no launcher: this process is the only rank
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    model = kind(config, "off").to(device, DTYPES[precision]).eval()
    load_weights(model, directory)
    for parameter in model.parameters():  # only rank 0 has read them
        torch.distributed.broadcast(parameter.data, src=0)
    return model, tokenizer


def load_weights(model: Network, directory: Path, part: str = "") -> None:
    """Set the weights of a model, or of a `part` of it, from a Hugging Face Llama directory; all call, rank 0 reads.

    `part` is a prefix of weight names, up to a dot: `model` is all but the heads. Weights of other parts in the
    directory are ignored.
    Raises ValueError, naming the file and the weights, when weights are missing, unknown, not finite or of the wrong
    shape, and when there are no safetensors.
    """
    files = _weight_files(directory)
    begin = f"{part}." if part else ""
    files = {name: path for name, path in files.items() if name.startswith(begin)}
    expected = {f"{begin}{name}" for name, _ in model.get_submodule(part).named_parameters()}
    ignored = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    unknown = {name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq")} - ignored
    for problem, names in (("lacks", expected - files.keys()), ("has unknown", unknown)):
        if names:
            raise ValueError(f"{directory} {problem} weights: {_some(names)}; config.json belongs to other weights")

    def value_of(name_in_part: str, shape: torch.Size) -> Tensor:
        name = f"{begin}{name_in_part}"
        path = files[name]
        with safe_open(path, framework="pt") as file:
            found = torch.Size(file.get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{path}: `{name}` has shape {tuple(found)}, but config.json makes it {tuple(shape)}")
            value: Tensor = file.get_tensor(name)
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: `{name}` holds values that are not finite: its training failed, or the file is damaged"
            )
        return value

    fill_weights(model.get_submodule(part), value_of)


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(f"`{name}`" for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _weight_files(directory: Path) -> dict[str, Path]:
    """Return the file that holds each weight, by the weight's name."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map", {})
        names = sorted(set(weight_map.values()))
    elif (directory / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{directory} holds pickled weights ({pickled[0]}), which can run arbitrary code when read: "
                "convert them to safetensors first"
            )
        raise ValueError(f"{directory} holds no {WEIGHTS}: it is not a Hugging Face checkpoint")
    files = {}
    for name in names:
        path = directory / name
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing, though {INDEX} names it") from None
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a complete safetensors file: it is damaged, or was not copied completely ({error})"
            ) from None
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is not a Hugging Face checkpoint") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON: it is damaged") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values
