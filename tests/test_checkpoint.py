from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from ranks import SMALL, TRAINED, join_alone
from safetensors.torch import load_file, save_file

from model.checkpoint import load_weights, read_config, save_model
from model.engine import EngineParams, build_model, draw_weights
from model.packing import documents_of
from model.tokenizer import Tokenizer
from model.transformer import Llama, ModelConfig

CPU = torch.device("cpu")
NO_LIMIT = 2**40


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    join_alone()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the llama walks over the hill", "a hill, a llama, 12 steps"] * 20),
        model_prefix=str(path), vocab_size=290, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return Tokenizer(path.with_suffix(".model"))


def model_of(zero_stage: int = 0, precision: str = "fp32", seed: int = 1, **changes: Any) -> Llama:
    params = EngineParams.model_validate({**TRAINED, "zero_stage": zero_stage, "precision": precision})
    model = build_model(ModelConfig.model_validate({**SMALL, "vocab_size": 290, **changes}), params)
    draw_weights(model, seed)
    return model


def logits_of(model: Llama) -> torch.Tensor:
    ids = torch.arange(5, 25)
    with torch.no_grad():
        return model(ids, documents_of([20], CPU))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}], ids=["", "tied"])
@pytest.mark.parametrize("max_shard_bytes", [NO_LIMIT, 20_000], ids=["one file", "sharded"])
def test_transformers_opens_a_checkpoint(
    max_shard_bytes: int, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = model_of(**changes)
    save_model(model, tokenizer, tmp_path / "base", {"step": 7}, max_shard_bytes)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert (theirs(torch.arange(5, 25)[None]).logits[0] - logits_of(model)).abs().max() < 1e-4
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    text = "the llama  walks 12 steps"
    assert AutoTokenizer.from_pretrained(tmp_path / "base")(text)["input_ids"] == tokenizer.encode(
        text, bos=True, eos=False
    )
    assert json.loads((tmp_path / "base" / "training.json").read_text()) == {"step": 7}
    sharded = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert (sharded == ["model.safetensors"]) == (max_shard_bytes == NO_LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    again = model_of(seed=2, **changes)
    load_weights(again, tmp_path / "base")
    assert read_config(tmp_path / "base") == model.config
    assert torch.equal(logits_of(again), logits_of(model))


def test_shards_hold_no_more_than_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = model_of()
    save_model(model, tokenizer, tmp_path / "base", {}, 40_000)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    shards = {path.name: load_file(path) for path in (tmp_path / "base").glob("*.safetensors")}
    assert {name: file for file, shard in shards.items() for name in shard} == index["weight_map"]
    sizes = [sum(4 * weight.numel() for weight in shard.values()) for shard in shards.values()]
    assert max(sizes) <= 40_000 or len(shards) == len(index["weight_map"])
    assert len(shards) >= sum(sizes) / 40_000


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_weights_shared_out_by_zero_are_written_whole(zero_stage: int, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model(model_of(zero_stage=0, precision="fp32"), tokenizer, tmp_path / "plain", {}, NO_LIMIT)
    save_model(model_of(zero_stage=zero_stage), tokenizer, tmp_path / "base", {}, NO_LIMIT)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "base"))
    assert one == other
    again = model_of(zero_stage=zero_stage, seed=2)
    load_weights(again, tmp_path / "plain")
    save_model(again, tokenizer, tmp_path / "again", {}, NO_LIMIT)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == one


STRETCHED = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_a_checkpoint_of_transformers_is_read(rope_type: str, tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": rope_type, "rope_theta": 500.0, **(STRETCHED if rope_type == "llama3" else {})}
    values = {**SMALL, "vocab_size": 290, "rope_parameters": rope, "tie_word_embeddings": tied}
    theirs = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in values.items() if name != "rope_theta"}))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    model = Llama(read_config(tmp_path / "theirs"), "off")
    load_weights(model, tmp_path / "theirs")
    assert model.config.rope_theta == 500.0
    save_model(model, tokenizer, tmp_path / "ours", {}, NO_LIMIT)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        for other in (theirs.eval(), again):
            assert (other(torch.arange(5, 25)[None]).logits[0] - logits_of(model)).abs().max() < 1e-4


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_both_spellings_of_a_stretched_rope_are_read(kind: str, key: str, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    rope = {kind: "llama3", **{name: value for name, value in STRETCHED.items() if not name.startswith("original")}}
    theta = {"rope_theta": 500.0}
    config = {**json.loads(path.read_text()), **theta, key: rope}
    if key == "rope_parameters":
        del config["rope_theta"], config["rope_scaling"]
        config[key] |= theta
    path.write_text(json.dumps(config))
    found = read_config(checkpoint)
    assert found.rope_theta == 500.0
    assert found.rope_scaling is not None
    # what is left out is the context itself, as in transformers
    assert found.rope_scaling.model_dump() == {
        **STRETCHED,
        "rope_type": "llama3",
        "original_max_position_embeddings": 32,
    }


@pytest.fixture
def checkpoint(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(model_of(), tokenizer, tmp_path / "base", {}, NO_LIMIT)
    return tmp_path / "base"


def test_weights_that_do_not_fit_are_named(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    norm = "model.norm.weight"

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            load_weights(model_of(), checkpoint)

    refused({name: w for name, w in weights.items() if name != norm}, f"base lacks weights: `{norm}`; config.json")
    refused({norm: weights[norm]}, r"lacks weights: `lm_head.weight`, `model.embed_tokens.weight`, .* and 17 more")
    refused({**weights, "extra.bias": torch.ones(2)}, "base has unknown weights: `extra.bias`")
    refused({**weights, norm: torch.ones(31)}, rf"`{norm}` has shape \(31,\), and config.json makes it \(32,\)")
    refused({**weights, norm: torch.full((32,), torch.nan)}, f"`{norm}` holds values that are not finite")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)  # of older checkpoints
    load_weights(model_of(), checkpoint)


def test_damaged_or_pickled_weights_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        load_weights(model_of(), checkpoint)
    path.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model\.bin\), which can run any code"):
        load_weights(model_of(), checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: it is no Hugging Face checkpoint"):
        load_weights(model_of(), checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    with pytest.raises(
        ValueError, match=r"model-00001-of-00002\.safetensors is missing, though model\.safetensors\.index"
    ):
        load_weights(model_of(), checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"it has model_type 'gpt2' \(not 'llama'\)"),
        ({"attention_bias": True}, r"it has attention_bias True \(not False\)"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"it has rope_type 'yarn' \(not 'default' or 'llama3'\)"),
        ({"rope_parameters": {"type": "llama3", "factor": 0.5}}, r"rope_scaling\.factor 0\.5: Input should be greater"),
        ({"head_dim": 16}, r"it has head_dim 16 \(not hidden_size / num_attention_heads = 8\)"),
        ({"hidden_size": None}, "hidden_size None: Input should be a valid integer"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        read_config(checkpoint)


def test_a_config_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    for text, message in (("{", "is not valid JSON: it is damaged"), ("[1]", "is not valid JSON: it holds no object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            read_config(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json is missing: .*base is no Hugging Face checkpoint"):
        read_config(checkpoint)
