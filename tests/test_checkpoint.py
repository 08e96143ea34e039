from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from safetensors.torch import load_file, save_file

from model.importing.llama2c import import_llama2c, main
from model.network.checkpoint import load_weights, read_config, read_tokenizer, save_model
from model.network.packing import documents_of
from model.network.transformer import Llama, ModelConfig
from model.sampling.sampler import Sampling, sample
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model, draw_weights

DATASETS = Path(__file__).parents[2] / "shared" / "datasets"
STORIES, STORIES_TOKENIZER = DATASETS / "interop" / "stories260K.bin", DATASETS / "interop" / "tok512.model"
CPU = torch.device("cpu")
NO_LIMIT = 2**40


@pytest.fixture(scope="module", autouse=True)
def alone() -> None:
    join_alone()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["the llama walks over the hill", "a hill, a llama, 12 steps"]
    return Tokenizer(train_tokenizer(tmp_path_factory.mktemp("tokenizer"), texts))


def model_of(zero_stage: int = 0, precision: str = "fp32", seed: int = 1, **changes: Any) -> Llama:
    params = EngineParams.model_validate({**TRAINED, "zero_stage": zero_stage, "precision": precision})
    model = build_model(Llama, ModelConfig.model_validate({**SMALL, "vocab_size": 290, **changes}), params)
    draw_weights(model, seed)
    return model


def logits_of(model: Llama) -> torch.Tensor:
    ids = torch.arange(5, 25)
    with torch.no_grad():
        return model(ids, documents_of([20], CPU))


def open_here(directory: Path) -> Llama:
    model = Llama(read_config(directory), "off")
    load_weights(model, directory)
    return model


def greedy_ids(model: Llama, tokenizer: Tokenizer, prompt: str, num_tokens: int) -> list[int]:
    ids = tokenizer.encode(prompt, bos=True, eos=False)
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=num_tokens)
    [[response]] = sample(
        model, [ids], greedy, num_samples=1, eos_id=tokenizer.eos_id, seeds=[0], max_rows=1, description=None
    )
    return [*ids, *response.ids]


def greedy_by_transformers(directory: Path, prompt: str, num_tokens: int) -> tuple[list[int], str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(directory) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt_ids = tokenizer(prompt, return_tensors="pt")
    [ids] = model.generate(**prompt_ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


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
    # not the text: what a model without training gives is seldom UTF-8, and libraries differ in what they make of it
    assert greedy_by_transformers(tmp_path / "base", text, 12)[0] == greedy_ids(model, tokenizer, text, 12)
    assert json.loads((tmp_path / "base" / "training.json").read_text()) == {"step": 7}
    sharded = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    assert (sharded == ["model.safetensors"]) == (max_shard_bytes == NO_LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    again = model_of(seed=2, **changes)
    load_weights(again, tmp_path / "base")
    assert read_config(tmp_path / "base") == model.config
    assert read_tokenizer(tmp_path / "base", model.config).encode(text, bos=True, eos=False) == tokenizer.encode(
        text, bos=True, eos=False
    )
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
    model = open_here(tmp_path / "theirs")
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
    refused({**weights, norm: torch.ones(31)}, rf"`{norm}` has shape \(31,\), but config.json makes it \(32,\)")
    refused({**weights, norm: torch.full((32,), torch.nan)}, f"`{norm}` holds values that are not finite")
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path)  # of older checkpoints
    load_weights(model_of(), checkpoint)


def test_damaged_or_pickled_weights_are_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a complete safetensors file"):
        load_weights(model_of(), checkpoint)
    path.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickled weights \(pytorch_model\.bin\), which can run arbitrary code"):
        load_weights(model_of(), checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors: it is not a Hugging Face checkpoint"):
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
        ({"num_key_value_heads": 3}, r"build: Value error, num_attention_heads 4 must be a multiple of"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        read_config(checkpoint)


def test_a_config_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    for text, message in (("{", "is not valid JSON: it is damaged"), ("[1]", "is not a JSON object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            read_config(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match=r"config\.json is missing: .*base is not a Hugging Face checkpoint"):
        read_config(checkpoint)


def test_a_tokenizer_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    config = read_config(checkpoint)
    other = ModelConfig.model_validate({**config.model_dump(), "vocab_size": 300})
    with pytest.raises(
        ValueError, match=r"tokenizer\.model has 290 tokens, and .*config\.json describes a model of 300"
    ):
        read_tokenizer(checkpoint, other)
    (checkpoint / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"base has a tokenizer\.json but no tokenizer\.model: a SentencePiece model"):
        read_tokenizer(checkpoint, config)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        read_tokenizer(checkpoint, config)


# --- llama2.c ---

Floats = npt.NDArray[np.float32]
D, F, L, N, K, H, V, CONTEXT = 32, 48, 2, 4, 2, 8, 290, 24


def draw_llama2c(tied: bool) -> dict[str, Floats]:
    """Weights by llama2.c's names, in its order."""
    shapes = {
        "embeddings": (V, D), "rms_att": (L, D), "wq": (L, D, D), "wk": (L, K * H, D), "wv": (L, K * H, D),
        "wo": (L, D, D), "rms_ffn": (L, D), "w1": (L, F, D), "w2": (L, D, F), "w3": (L, F, D), "rms_final": (D,),
        "freq_real": (CONTEXT, H // 2), "freq_imag": (CONTEXT, H // 2), **({} if tied else {"wcls": (V, D)}),
    }  # fmt: skip
    rng = np.random.default_rng(3)
    return {name: rng.normal(0.0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama2c(path: Path, weights: dict[str, Floats]) -> None:
    header = np.array([D, F, L, N, K, -V if "wcls" in weights else V, CONTEXT], dtype="<i4")
    path.write_bytes(header.tobytes() + b"".join(weight.astype("<f4").tobytes() for weight in weights.values()))


def logits_of_llama2c(weights: dict[str, Floats], ids: list[int]) -> Floats:
    """What llama2.c computes, a token at a time; neighbours turn together, as complex numbers."""

    def norm(x: Floats, scale: Floats) -> Floats:
        return scale * x / np.sqrt((x * x).mean() + 1e-5)

    def turn(x: Floats, position: int) -> Floats:
        angles = position / 10000.0 ** (np.arange(0, H, 2) / H)
        turned = (x.reshape(-1, H // 2, 2) @ np.array([1, 1j])) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(-1, H)

    keys: list[list[Floats]] = [[] for _ in range(L)]
    values: list[list[Floats]] = [[] for _ in range(L)]
    logits = []
    for position, token in enumerate(ids):
        x = weights["embeddings"][token]
        for layer in range(L):
            w = {name: stack[layer] for name, stack in weights.items() if len(stack) == L}
            normed = norm(x, w["rms_att"])
            q = turn(w["wq"] @ normed, position)
            keys[layer].append(turn(w["wk"] @ normed, position))
            values[layer].append((w["wv"] @ normed).reshape(K, H))
            heads = []
            for head in range(N):
                shared = head // (N // K)
                scores = np.array([q[head] @ key[shared] / np.sqrt(H) for key in keys[layer]])
                shares = np.exp(scores - scores.max())
                heads.append(shares / shares.sum() @ np.array([value[shared] for value in values[layer]]))
            x = x + w["wo"] @ np.concatenate(heads)
            normed = norm(x, w["rms_ffn"])
            gate = w["w1"] @ normed
            x = x + w["w2"] @ (gate / (1 + np.exp(-gate)) * (w["w3"] @ normed))
        logits.append(weights.get("wcls", weights["embeddings"]) @ norm(x, weights["rms_final"]))
    return np.array(logits, dtype=np.float32)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_of_llama2c_computes_what_llama2c_does(tied: bool, tokenizer: Tokenizer, tmp_path: Path) -> None:
    weights = draw_llama2c(tied)
    write_llama2c(tmp_path / "source.bin", weights)
    main([str(tmp_path / "source.bin"), str(tokenizer.path), str(tmp_path / "imported")])
    model = open_here(tmp_path / "imported")
    expected = torch.from_numpy(logits_of_llama2c(weights, list(range(5, 25))))
    assert (logits_of(model) - expected).abs().max() < 1e-4 * expected.abs().max()
    assert model.config == ModelConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5, rope_theta=10000.0,
        initializer_range=0.02, tie_word_embeddings=tied,
    )  # fmt: skip
    read_tokenizer(tmp_path / "imported", model.config)


def test_llama2cs_stories_are_told(tmp_path: Path) -> None:
    if not STORIES.exists():
        pytest.skip(f"llama2.c's smallest model isn't at {STORIES}")
    command = [sys.executable, "-m", "model.importing.llama2c", STORIES, STORIES_TOKENIZER, tmp_path / "stories"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    model = open_here(tmp_path / "stories")
    tokenizer = read_tokenizer(tmp_path / "stories", model.config)
    ids = greedy_ids(model, tokenizer, "", 100)
    story = tokenizer.decode(ids)
    assert story.startswith("Once upon a time, there was a ")
    with gzip.open(DATASETS / "sft" / "oasst1_en.jsonl.gz", "rt", encoding="utf-8") as file:
        english = set(re.findall(r"[a-z']+", file.read().lower()))
    words = re.findall(r"[a-z']+", story.lower())[:-1]  # the last may be cut
    assert len(words) > 40
    assert set(words) - english <= {"lily", "lily's", "mom"}
    assert greedy_by_transformers(tmp_path / "stories", "", 100) == (ids, story)
    kept = "two  spaces "
    assert tokenizer.decode(tokenizer.encode(kept, bos=True, eos=False)) == kept


def test_what_is_no_checkpoint_of_llama2c_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source, directory = tmp_path / "source.bin", tmp_path / "imported"

    def refused(message: str, tokenizer_path: Path = tokenizer.path) -> None:
        with pytest.raises(ValueError, match=message):
            import_llama2c(source, tokenizer_path, directory)
        assert not directory.exists()

    refused(r"source\.bin is missing: a checkpoint exported by llama2\.c is needed there")
    write_llama2c(source, draw_llama2c(tied=False))
    whole = source.read_bytes()
    refused(r"nowhere\.model is missing: a SentencePiece", tmp_path / "nowhere.model")
    refused(r"source\.bin is not a SentencePiece model", source)
    source.write_bytes(whole[:20])
    refused(r"source\.bin has 20 bytes: it is not a checkpoint exported by llama2\.c")
    source.write_bytes(whole[:-4])
    refused(rf"has {len(whole) - 4} bytes, but the model that its header describes takes {len(whole)}: it is damaged")
    source.write_bytes(np.array([-D, F, 0, N, K, V, CONTEXT], dtype="<i4").tobytes() + whole[28:])
    refused("build: hidden_size -32: Input should be greater than 0; num_hidden_layers 0: Input should be greater")
    source.write_bytes(np.array([D, F, L, N, 3, V, CONTEXT], dtype="<i4").tobytes() + whole[28:])
    refused("build: Value error, num_attention_heads 4 must be a multiple of num_key_value_heads")
    source.write_bytes(np.array([D, F, 2**31 - 1, N, K, V, CONTEXT], dtype="<i4").tobytes() + whole[28:])
    refused("bytes, but the model that its header describes takes")
    wrong = draw_llama2c(tied=True)
    wrong["embeddings"] = wrong["embeddings"][:-1].repeat(2, axis=0)[: V - 1]
    header = np.array([D, F, L, N, K, V - 1, CONTEXT], dtype="<i4").tobytes()
    source.write_bytes(header + b"".join(weight.tobytes() for weight in wrong.values()))
    refused(r"tokenizer\.model has 290 tokens, and .*source\.bin describes a model of 289 \(`vocab_size`\)")
    wrong = draw_llama2c(tied=True)
    wrong["wk"][1, 3, 4] = np.nan
    write_llama2c(source, wrong)
    refused(r"source\.bin: `model\.layers\.1\.self_attn\.k_proj\.weight` holds values that are not finite")


def test_an_import_overwrites_nothing(checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_llama2c(tmp_path / "source.bin", draw_llama2c(tied=True))
    with pytest.raises(ValueError, match="base already exists: name a new directory"):
        import_llama2c(tmp_path / "source.bin", tokenizer.path, checkpoint)


def test_another_command_is_answered_with_the_one_that_there_is(tmp_path: Path) -> None:
    for arguments in ([], ["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(
            ValueError, match=r"three paths are needed: `python -m model\.importing\.llama2c SOURCE\.bin T"
        ):
            main(arguments)
