"""Convert llama2.c's checkpoints: `python -m model.importing.llama2c SOURCE.bin TOKENIZER.model DIRECTORY`."""

from __future__ import annotations

import math
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.network.checkpoint import CHAT_FIELDS, WEIGHTS, check_fit, config_of, write_checkpoint
from model.network.transformer import ModelConfig
from model.text.tokenizer import Tokenizer

HEADER = struct.Struct("<7i")  # the seven numbers that a file of version 0 begins with
BUILT_INTO_LLAMA2C = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "initializer_range": 0.02}
ANGLES = "freq_cis"
# Appended to a SentencePiece model, a protobuf message, this changes one setting: the model no longer drops spaces.
# llama2.c's tokenizer files say that they drop them, but its own program never does.
KEEP_SPACES = bytes([0x1A, 2, 0x20, 0])  # field 3, normalizer_spec, of 2 bytes: field 4, remove_extra_whitespaces, 0


def import_llama2c(source: Path, tokenizer_path: Path, directory: Path) -> None:
    """Convert a checkpoint that llama2.c exported (version 0) into a new directory.

    Raises ValueError, naming the file, when it is damaged or of another kind or version, when the tokenizer has another
    vocabulary, and when the directory holds files.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} already exists: name a new directory")
    config = _llama2c_config(source)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _llama2c_tokenizer(tokenizer_path, Path(temporary) / "tokenizer.model")
        check_fit(tokenizer, config, source)
        names = (name for name, _ in _llama2c_layout(config) if name != ANGLES)
        files = {name.format(layer): WEIGHTS for name in names for layer in range(config.num_hidden_layers)}
        write_checkpoint(
            config,
            _llama2c_weights(source, config),
            files,
            tokenizer,
            directory,
            {"imported": source.name},
            CHAT_FIELDS,
            apart={},
        )


def _llama2c_config(source: Path) -> ModelConfig:
    """Return the model that a file's header describes, if the file's size fits it."""
    if not source.is_file():
        raise ValueError(f"{source} is missing: a checkpoint exported by llama2.c is needed there")
    with source.open("rb") as file:
        header = file.read(HEADER.size)
    size = source.stat().st_size
    if len(header) < HEADER.size:
        raise ValueError(f"{source} has {size} bytes: it is not a checkpoint exported by llama2.c")
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    values = dict(zip(names, HEADER.unpack(header), strict=True))
    tied = {"vocab_size": abs(values["vocab_size"]), "tie_word_embeddings": values["vocab_size"] > 0}
    config = config_of({**values, **tied, **BUILT_INTO_LLAMA2C}, source)
    expected = HEADER.size + 4 * sum(math.prod(shape) for _, shape in _llama2c_layout(config))
    if size != expected:
        raise ValueError(
            f"{source} has {size} bytes, but the model that its header describes takes {expected}: it is damaged, or "
            "not a checkpoint exported by llama2.c as version 0"
        )
    return config


def _llama2c_layout(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of a file's parts, in order; `{}` stands for the layers, stacked in one part."""
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
    """Yield each weight by Hugging Face's name; rotary pairs, adjacent in llama2.c, move half a head apart."""
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
    """Return the tokenizer, opened from a copy that keeps spaces."""
    if path.is_file():
        copy.write_bytes(path.read_bytes() + KEEP_SPACES)
    try:
        return Tokenizer(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(path))) from None


def main(arguments: Sequence[str]) -> None:
    """Run the conversion that the command line asks for."""
    match arguments:
        case [source, tokenizer, directory]:
            import_llama2c(Path(source), Path(tokenizer), Path(directory))
        case _:
            command = "python -m model.importing.llama2c SOURCE.bin TOKENIZER.model DIRECTORY"
            raise ValueError(f"three paths are needed: `{command}`")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
