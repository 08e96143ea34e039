"""Checkpoints: Hugging Face Llama directories, written whole or not at all, read from here or anywhere.

config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json), the tokenizer's
files and training.json. transformers, vLLM and llama.cpp open them as they are. Pickled weights are never read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.engine import fill_weights, shape_of, whole
from model.tokenizer import Tokenizer
from model.transformer import Llama, ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BUILT_IN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def save_model(
    model: Llama, tokenizer: Tokenizer, directory: Path, training: Mapping[str, Any], max_shard_bytes: int
) -> None:
    """Write a checkpoint into `directory`, which is new or empty; all ranks call, rank 0 writes.

    Weights are gathered one by one, and rank 0 holds one shard at a time. `training` goes into training.json.
    """
    writes = torch.distributed.get_rank() == 0
    temporary = directory.with_name(f".{directory.name}.partial")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    shards = _plan_shards(model, max_shard_bytes)
    shard: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with whole(parameter, changed=False):
            if writes:
                shard[name] = parameter.detach().to("cpu", copy=True)
        file = shards[name]
        if writes and len(shard) == sum(other == file for other in shards.values()):
            save_file(shard, temporary / file, metadata={"format": "pt"})
            shard.clear()
    if writes:
        if len(set(shards.values())) > 1:
            total = sum(_num_bytes(parameter) for parameter in model.parameters())
            _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": shards})
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype, **BUILT_IN, **ids}
        _write_json(temporary / "config.json", {**config, **model.config.model_dump()})
        _write_json(temporary / "generation_config.json", ids)
        _write_json(temporary / "training.json", dict(training))
        tokenizer.save(temporary)
        temporary.replace(directory)
    torch.distributed.barrier()


def _num_bytes(parameter: Tensor) -> int:
    return shape_of(parameter).numel() * parameter.element_size()


def _plan_shards(model: Llama, max_shard_bytes: int) -> dict[str, str]:
    """Return the file of each weight: filled in the model's order up to the size given."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, parameter in model.named_parameters():
        size = _num_bytes(parameter)
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

    Raises ValueError, naming the file, when config.json is missing, damaged, or describes what this model is not.
    """
    path = directory / "config.json"
    values = _read_json(path)
    rope = {**(values.pop("rope_scaling", None) or {}), **(values.pop("rope_parameters", None) or {})}
    kind = rope.pop("type", "default")  # its name before transformers 4.43
    kind = rope.setdefault("rope_type", kind)
    found = {**BUILT_IN, **values}
    wrong = [f"{key} {found[key]!r} (not {value!r})" for key, value in BUILT_IN.items() if found[key] != value]
    wrong += [f"rope_type {kind!r} (not 'default' or 'llama3')"] if kind not in ("default", "llama3") else []
    if not wrong:
        theta = values.get("rope_theta", 10000.0)  # what transformers leaves out is Llama 2's
        values["rope_theta"] = rope.pop("rope_theta", theta)
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        if kind == "llama3":
            rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
            values["rope_scaling"] = rope
        try:
            config = ModelConfig.model_validate({key: values.get(key) for key in ModelConfig.model_fields})
        except ValidationError as error:
            details = "; ".join(f"{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{path} describes no Llama model that this code can build: {details}") from None
        if values.get("head_dim") in (None, config.head_size):
            return config
        wrong = [f"head_dim {values['head_dim']} (not hidden_size / num_attention_heads = {config.head_size})"]
    raise ValueError(f"{path} describes no Llama model that this code can build: it has {', '.join(wrong)}")


def load_weights(model: Llama, directory: Path) -> None:
    """Set a model's weights from a Hugging Face Llama directory; all ranks call, rank 0 reads.

    Raises ValueError, naming the file and the weights, when weights are missing, unknown, misshapen or not finite,
    and when there are no safetensors.
    """
    files = _weight_files(directory)
    expected = {
        name: torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
    }
    ignored = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    unknown = {name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq")} - ignored
    for problem, names in (("lacks", expected - files.keys()), ("has unknown", unknown)):
        if names:
            raise ValueError(f"{directory} {problem} weights: {_some(names)}; config.json belongs to other weights")

    def value_of(name: str, shape: torch.Size) -> Tensor:
        path = files[name]
        with safe_open(path, framework="pt") as file:
            found = torch.Size(file.get_slice(name).get_shape())
            if found != shape:
                raise ValueError(f"{path}: `{name}` has shape {tuple(found)}, and config.json makes it {tuple(shape)}")
            value: Tensor = file.get_tensor(name)
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: `{name}` holds values that are not finite: its training had failed, or it is damaged"
            )
        return value

    fill_weights(model, value_of)


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(f"`{name}`" for name in listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _weight_files(directory: Path) -> dict[str, Path]:
    """Return the file that holds each weight, by the weights' names."""
    if (directory / INDEX).exists():
        weight_map = _read_json(directory / INDEX).get("weight_map", {})
        names = sorted(set(weight_map.values()))
    elif (directory / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        if pickled:
            raise ValueError(
                f"{directory} holds pickled weights ({pickled[0]}), which can run any code when read: "
                "convert them to safetensors first"
            )
        raise ValueError(f"{directory} holds no {WEIGHTS}: it is no Hugging Face checkpoint")
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
                f"{path} is no whole safetensors file: it is damaged, or its copy broke off ({error})"
            ) from None
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {path.parent} is no Hugging Face checkpoint") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON: it is damaged") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not valid JSON: it holds no object")
    return values
