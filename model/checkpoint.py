"""Checkpoints: Hugging Face Llama directories, written whole or not at all, read from here or anywhere.

config.json, generation_config.json, model.safetensors (or shards with model.safetensors.index.json), the tokenizer's
files and training.json. transformers, vLLM and llama.cpp open them as they are. Pickled weights are never read.

A reward model is a LlamaForSequenceClassification with one label; its head for safety, which that has no place for, is
in a file of its own, safety_head.safetensors.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.engine import fill_weights, shape_of, whole
from model.reward import RewardModel
from model.tokenizer import Tokenizer
from model.transformer import Llama, ModelConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAFETY_HEAD = "safety_head.safetensors"
CHAT_FIELDS = {"architectures": ["LlamaForCausalLM"]}
REWARD_ARCHITECTURE = "LlamaForSequenceClassification"
BUILT_IN = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def save_model(
    model: Llama | RewardModel,
    tokenizer: Tokenizer,
    directory: Path,
    training: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Write a model's checkpoint into `directory`, which is new or empty; all ranks call, rank 0 writes.

    Weights are gathered one by one, and rank 0 holds one shard at a time. `training` goes into training.json.
    """
    weights = _gathered(model)
    if torch.distributed.get_rank() == 0:
        sizes = {name: shape_of(weight).numel() * weight.element_size() for name, weight in model.named_parameters()}
        apart = {name: SAFETY_HEAD for name in sizes if name.startswith("safety.")}
        kept = {name: size for name, size in sizes.items() if name not in apart}
        files = {**_plan_shards(kept, max_shard_bytes), **apart}
        fields = _fields_of(model, tokenizer)
        _write(model.config, weights, files, tokenizer, directory, training, fields)
    else:
        for _ in weights:
            pass
    torch.distributed.barrier()


def _fields_of(model: Llama | RewardModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what config.json says of the kind of model."""
    if isinstance(model, Llama):
        return CHAT_FIELDS
    labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {"architectures": [REWARD_ARCHITECTURE], "pad_token_id": tokenizer.unk_id, **labels}


def _gathered(model: Llama | RewardModel) -> Iterator[tuple[str, Tensor]]:
    """Give each weight by its name, whole only until the next is asked for."""
    for name, parameter in model.named_parameters():
        with whole(parameter, changed=False):
            yield name, parameter.detach()


def _write(
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    files: Mapping[str, str],
    tokenizer: Tokenizer,
    directory: Path,
    training: Mapping[str, Any],
    fields: Mapping[str, Any],
) -> None:
    """Write a checkpoint from its weights, one at a time, the name of each one's file, and its kind's fields."""
    temporary = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    left = Counter(files.values())
    shard: dict[str, Tensor] = {}
    num_bytes, dtype = 0, ""
    for name, weight in weights:
        shard[name] = weight.to("cpu", copy=True)
        num_bytes += weight.nbytes if files[name] != SAFETY_HEAD else 0
        dtype = str(weight.dtype).removeprefix("torch.")
        left[files[name]] -= 1
        if not left[files[name]]:
            save_file(shard, temporary / files[name], metadata={"format": "pt"})
            shard.clear()
    if WEIGHTS not in left:
        weight_map = {name: file for name, file in files.items() if file != SAFETY_HEAD}
        _write_json(temporary / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    fixed = {**fields, "torch_dtype": dtype, **BUILT_IN, **ids}
    _write_json(temporary / "config.json", {**fixed, **config.model_dump()})
    _write_json(temporary / "generation_config.json", ids)
    _write_json(temporary / "training.json", dict(training))
    tokenizer.save(temporary)
    temporary.replace(directory)


def _plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> dict[str, str]:
    """Return the file of each weight, given its bytes: filled in their order up to the size given."""
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
        config = _config_of({key: values.get(key) for key in ModelConfig.model_fields}, path)
        if values.get("head_dim") in (None, config.head_size):
            return config
        wrong = [f"head_dim {values['head_dim']} (not hidden_size / num_attention_heads = {config.head_size})"]
    raise ValueError(f"{path} describes no Llama model that this code can build: it has {', '.join(wrong)}")


def _config_of(values: Mapping[str, Any], path: Path) -> ModelConfig:
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
            f"{directory} has a tokenizer.json and no tokenizer.model: a SentencePiece model, as Llama 2 has, is "
            "needed; a model with another tokenizer, as Llama 3 has, can't be used"
        )
    tokenizer = Tokenizer(path)
    _check_fit(tokenizer, config, directory / "config.json")
    return tokenizer


def _check_fit(tokenizer: Tokenizer, config: ModelConfig, model: Path) -> None:
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, and {model} describes a model of "
            f"{config.vocab_size} (`vocab_size`): bring the tokenizer that the model was trained with"
        )


def is_reward_model(directory: Path) -> bool:
    """Tell whether a Hugging Face Llama directory holds a reward model."""
    return REWARD_ARCHITECTURE in (_read_json(directory / "config.json").get("architectures") or [])


def load_weights(model: Llama | RewardModel, directory: Path, part: str = "") -> None:
    """Set a model's weights, or those of a `part` of it, from a Hugging Face Llama directory; all call, rank 0 reads.

    `part` is the beginning of the weights' names up to a point: `model` is all but the heads. The directory's weights
    of other parts are not looked at.
    Raises ValueError, naming the file and the weights, when weights are missing, unknown, misshapen or not finite,
    and when there are no safetensors.
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
                raise ValueError(f"{path}: `{name}` has shape {tuple(found)}, and config.json makes it {tuple(shape)}")
            value: Tensor = file.get_tensor(name)
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: `{name}` holds values that are not finite: its training had failed, or it is damaged"
            )
        return value

    fill_weights(model.get_submodule(part), value_of)


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


# --- llama2.c ---

HEADER = struct.Struct("<7i")  # the seven numbers that a file of version 0 begins with
BUILT_INTO_LLAMA2C = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02}
ANGLES = "freq_cis"
# Appended to a SentencePiece model, a protobuf message, this changes one of its settings: it no longer drops spaces.
# llama2.c's tokenizers say that they do, and its own program never does.
KEEP_SPACES = bytes([0x1A, 2, 0x20, 0])  # field 3, normalizer_spec, of 2 bytes: field 4, remove_extra_whitespaces, 0


def import_llama2c(source: Path, tokenizer_path: Path, directory: Path) -> None:
    """Write a checkpoint into a new directory from one that llama2.c exported (version 0).

    Raises ValueError, naming the file, for one that is damaged or of another kind or version, a tokenizer of another
    vocabulary, and a directory that holds files.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is there already: name a new directory")
    config = _llama2c_config(source)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _llama2c_tokenizer(tokenizer_path, Path(temporary) / "tokenizer.model")
        _check_fit(tokenizer, config, source)
        names = (name for name, _ in _llama2c_layout(config) if name != ANGLES)
        files = {name.format(layer): WEIGHTS for name in names for layer in range(config.num_hidden_layers)}
        _write(
            config,
            _llama2c_weights(source, config),
            files,
            tokenizer,
            directory,
            {"imported": source.name},
            CHAT_FIELDS,
        )


def _llama2c_config(source: Path) -> ModelConfig:
    """Return the model that a file's header describes, if the file has its size."""
    if not source.is_file():
        raise ValueError(f"{source} is missing: a checkpoint that llama2.c exported is needed there")
    with source.open("rb") as file:
        header = file.read(HEADER.size)
    size = source.stat().st_size
    if len(header) < HEADER.size:
        raise ValueError(f"{source} has {size} bytes: it is no checkpoint that llama2.c exported")
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    values = dict(zip(names, HEADER.unpack(header), strict=True))
    tied = {"vocab_size": abs(values["vocab_size"]), "tie_word_embeddings": values["vocab_size"] > 0}
    config = _config_of({**values, **tied, **BUILT_INTO_LLAMA2C}, source)
    expected = HEADER.size + 4 * sum(math.prod(shape) for _, shape in _llama2c_layout(config))
    if size != expected:
        raise ValueError(
            f"{source} has {size} bytes, and the model that it begins to describe takes {expected}: it is damaged, or "
            "no checkpoint that llama2.c exported as version 0"
        )
    return config


def _llama2c_layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a file's parts in their order; `{}` stands for the layers, stacked in one part."""
    width, hidden, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_size
    return [
        ("model.embed_tokens.weight", (config.vocab_size, width)),
        ("model.layers.{}.input_layernorm.weight", (layers, width)),
        ("model.layers.{}.self_attn.q_proj.weight", (layers, width, width)),
        ("model.layers.{}.self_attn.k_proj.weight", (layers, kv_width, width)),
        ("model.layers.{}.self_attn.v_proj.weight", (layers, kv_width, width)),
        ("model.layers.{}.self_attn.o_proj.weight", (layers, width, width)),
        ("model.layers.{}.post_attention_layernorm.weight", (layers, width)),
        ("model.layers.{}.mlp.gate_proj.weight", (layers, hidden, width)),
        ("model.layers.{}.mlp.down_proj.weight", (layers, width, hidden)),
        ("model.layers.{}.mlp.up_proj.weight", (layers, hidden, width)),
        ("model.norm.weight", (width,)),
        (ANGLES, (2, config.max_position_embeddings, config.head_size // 2)),
        *([] if config.tie_word_embeddings else [("lm_head.weight", (config.vocab_size, width))]),
    ]


def _llama2c_weights(source: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Give each weight by Hugging Face's name; pairs that turn together, neighbours there, come half a head apart."""
    begin = HEADER.size
    for name, shape in _llama2c_layout(config):
        part = np.memmap(source, dtype="<f4", mode="r", offset=begin, shape=shape)
        begin += part.nbytes
        if name == ANGLES:
            continue
        for layer, values in enumerate(part) if "{}" in name else [(0, part)]:
            weight = torch.from_numpy(values.copy())
            if not weight.isfinite().all():
                raise ValueError(f"{source}: `{name.format(layer)}` holds values that are not finite: it is damaged")
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight = weight.view(-1, config.head_size // 2, 2, config.hidden_size).transpose(1, 2).flatten(0, 2)
            yield name.format(layer), weight


def _llama2c_tokenizer(path: Path, copy: Path) -> Tokenizer:
    """Return the tokenizer as a copy that keeps spaces."""
    if path.is_file():
        copy.write_bytes(path.read_bytes() + KEEP_SPACES)
    try:
        return Tokenizer(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(path))) from None


def main(arguments: Sequence[str]) -> None:
    """Do what the command line asks for."""
    match arguments:
        case ["import", source, tokenizer, directory]:
            import_llama2c(Path(source), Path(tokenizer), Path(directory))
        case _:
            raise ValueError("what to do? `python -m model.checkpoint import SOURCE.bin TOKENIZER.model DIRECTORY`")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
