import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.network.losses import token_losses
from model.network.packing import IGNORED, documents_of
from model.network.transformer import (
    CHECKPOINTING,
    Checkpointing,
    Llama,
    ModelConfig,
    first_weights,
    flops_per_token,
    num_parameters,
    rotary_angles,
    rotate,
)

CPU = torch.device("cpu")


def config_of(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "initializer_range": 0.02, "tie_word_embeddings": False,
    }  # fmt: skip
    return ModelConfig.model_validate({**values, **changes})


def model_of(config: ModelConfig, seed: int, checkpointing: Checkpointing = "off", scale: float = 4.0) -> Llama:
    model = Llama(config, checkpointing)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator) if parameter.dim() == 1 else 0
            parameter.copy_(first_weights(name, parameter.shape, config, generator) * scale + noise)
    return model


def ids_of(config: ModelConfig, length: int, seed: int) -> Tensor:
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


STRETCHED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip

SIZES = {
    "heads alike": {},
    "grouped": {"num_key_value_heads": 2},
    "one key": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "wide": {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 6, "num_key_value_heads": 3,
             "vocab_size": 1500, "num_hidden_layers": 4, "rope_theta": 500000.0},
    "stretched": {"max_position_embeddings": 512, "rope_scaling": STRETCHED},
}  # fmt: skip


@pytest.mark.parametrize("changes", SIZES.values(), ids=SIZES.keys())
def test_logits_equal_transformers_llama(changes: dict[str, object]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = config_of(**changes)
    model = model_of(config, seed=1)
    theirs = LlamaForCausalLM(LlamaConfig(**config.model_dump(), attn_implementation="sdpa")).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and not missing
    ids = ids_of(config, 50, seed=2)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        assert (model(ids, documents_of([50], CPU)) - expected).abs().max() < 1e-4
        assert expected.std() > 0.1


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["heads alike", "grouped"])
def test_packed_documents_equal_each_alone_gradients_too(changes: dict[str, object]) -> None:
    config = config_of(**changes)
    model = model_of(config, seed=3)
    lengths = [7, 1, 30, 12]
    ids = ids_of(config, sum(lengths), seed=4)
    weights = torch.rand(sum(lengths), config.vocab_size, generator=torch.Generator().manual_seed(5))
    packed = model(ids, documents_of(lengths, CPU))
    packed_gradients = torch.autograd.grad((packed * weights).sum(), list(model.parameters()))
    alone = torch.cat([model(part, documents_of([len(part)], CPU)) for part in torch.split(ids, lengths)])
    gradients = torch.autograd.grad((alone * weights).sum(), list(model.parameters()))
    assert (packed - alone).abs().max() < 1e-5
    for ours, reference in zip(packed_gradients, gradients, strict=True):
        assert (ours - reference).abs().max() <= 1e-5 * reference.abs().max()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}], ids=["heads alike", "grouped"])
@pytest.mark.parametrize("lengths", [[30, 200, 40, 9, 300, 256], [16, 240, 256, 256]])
def test_attention_in_blocks_equals_attention_per_document(changes: dict[str, int], lengths: list[int]) -> None:
    config = config_of(max_position_embeddings=512, **changes)
    model = model_of(config, seed=3)
    ids, documents = ids_of(config, sum(lengths), seed=4), documents_of(lengths, CPU)
    with torch.no_grad():
        expected = model(ids, documents)
        found = model.to(torch.bfloat16)(ids, documents).float()
    # bf16 keeps 8 bits, so a few hundredths of the spread are rounding; a token that sees another document shifts more
    assert (found - expected).abs().mean() < 0.04 * expected.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=5), changed=st.integers(0, 4))
def test_a_token_changes_only_what_follows_it_in_its_document(
    dtype: torch.dtype, lengths: list[int], changed: int
) -> None:
    config = config_of(num_hidden_layers=1)
    model = model_of(config, seed=6).to(dtype)
    ids = ids_of(config, sum(lengths), seed=7)
    changed %= len(lengths)
    position = sum(lengths[:changed]) + lengths[changed] // 2
    other = ids.clone()
    other[position] = (ids[position] + 1) % config.vocab_size
    with torch.no_grad():
        documents = documents_of(lengths, CPU)
        differs = (model(ids, documents) != model(other, documents)).any(dim=1)
    end = sum(lengths[: changed + 1])
    assert differs[position]
    assert not differs[:position].any() and not differs[end:].any()


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    config = config_of()
    angles = rotary_angles(config, torch.tensor([0, 3, 10, 13]))
    q = torch.randn(1, 1, config.head_size, generator=torch.Generator().manual_seed(8)).expand(4, 1, -1)
    turned = rotate(q, angles)
    assert torch.allclose(turned.norm(dim=-1), q.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[0], q[0])
    assert torch.allclose((turned[0] * turned[1]).sum(), (turned[2] * turned[3]).sum(), atol=1e-4)
    # the second pair of a head of 8 turns by 3 / 10000^(2/8) = 0.3 at position 3
    assert rotary_angles(config, torch.tensor([3]))[0][0, 0, 1] == pytest.approx(math.cos(0.3))


def test_long_waves_are_stretched_and_short_ones_stay() -> None:
    sines = rotary_angles(config_of(rope_scaling=STRETCHED), torch.tensor([1]))[1][0, 0, 4:]
    # waves of 6.3, 62.8, 628, 6283 tokens: more than 4, 2.037, less than 1 fit into 128; (2.037 - 1) / 3 = 0.3457
    expected = [1.0, 0.1 * (0.3457 + 0.6543 / 8), 0.01 / 8, 0.001 / 8]
    assert sines.asin().tolist() == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match=r"low_freq_factor 4\.0 must be below high_freq_factor 4\.0"):
        config_of(rope_scaling={**STRETCHED, "low_freq_factor": 4.0})


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(checkpointing: Checkpointing) -> None:
    config = config_of(num_key_value_heads=2)
    ids, documents = ids_of(config, 40, seed=9), documents_of([25, 15], CPU)
    kept = model_of(config, seed=10)
    recomputed = model_of(config, seed=10, checkpointing=checkpointing)
    for model in (kept, recomputed):
        model(ids, documents, ids.roll(-1)).sum().backward()
    for ours, reference in zip(recomputed.parameters(), kept.parameters(), strict=True):
        assert torch.equal(ours.grad, reference.grad)  # type: ignore[arg-type]


def products_of(checkpointing: Checkpointing) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    config = config_of()
    ids, documents = ids_of(config, 64, seed=9), documents_of([64], CPU)
    model = model_of(config, seed=10, checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter:
        model(ids, documents, ids.roll(-1)).sum().backward()
    return int(sum(count for name, count in counter.get_flop_counts()["Global"].items() if "mm" in str(name)))


def test_selective_checkpointing_computes_no_matrix_product_twice() -> None:
    assert products_of("selective") == products_of("off")
    # Full checkpointing repeats the layers' forward products. It can leave out each layer's last, whose result nothing
    # needs, and does but where ZeRO-3, in a test before this one, put its own function in place of torch's linear.
    last = 2 * 32 * 88 * 64
    repeated = 2 * (4 * 32 * 32 + 3 * 32 * 88) * 64
    assert (products_of("full") - products_of("off")) in (2 * repeated, 2 * (repeated - last))
    assert set(CHECKPOINTING) == {"off", "selective", "full"}


def test_parameters_and_operations_are_counted() -> None:
    for changes in SIZES.values():
        config = config_of(**changes)
        assert num_parameters(config) == sum(p.numel() for p in Llama(config, "off").parameters())
    seven_b = config_of(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=32)  # fmt: skip
    assert num_parameters(seven_b) == 6_738_415_616
    # 6 x weights + 12 x layers x width x context
    assert flops_per_token(seven_b, 4096) == 6 * 6_738_415_616 + 12 * 32 * 4096 * 4096
    assert products_of("off") == 64 * 6 * (num_parameters(config_of()) - (96 + 5) * 32)


def test_first_weights_shrink_where_they_add_to_the_residual_stream() -> None:
    config = config_of(num_hidden_layers=8)
    generator = torch.Generator().manual_seed(11)
    shape = torch.Size((500, 500))
    assert first_weights("q_proj.weight", shape, config, generator).std() == pytest.approx(0.02, rel=0.02)
    assert first_weights("o_proj.weight", shape, config, generator).std() == pytest.approx(0.005, rel=0.02)
    assert torch.equal(first_weights("norm.weight", torch.Size((3,)), config, generator), torch.ones(3))


def test_token_losses_equal_one_cross_entropy_and_mask_what_is_ignored() -> None:
    generator = torch.Generator().manual_seed(12)
    hidden, weight = torch.randn(2500, 8, generator=generator), torch.randn(20, 8, generator=generator)
    targets = torch.randint(0, 20, (2500,), generator=generator)
    targets[::3] = IGNORED
    losses = token_losses(hidden, lambda x: x @ weight.T, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert torch.allclose(losses, expected, atol=1e-5)
    assert (losses[::3] == 0).all()


def test_the_head_reads_only_what_has_a_target() -> None:
    weight = torch.randn(20, 8, generator=torch.Generator().manual_seed(13))
    hidden = torch.ones(6, 8, requires_grad=True)
    seen: list[int] = []

    def head(hidden_CD: Tensor) -> Tensor:
        seen.append(len(hidden_CD))
        return hidden_CD @ weight.T

    token_losses(hidden, head, torch.tensor([IGNORED, 3, IGNORED, 4, 5, IGNORED])).sum().backward()
    assert sum(seen) == 3
    gradient = hidden.grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, True, False, True, True, False]
    hidden.grad = None
    losses = token_losses(hidden, head, torch.full((6,), IGNORED))
    losses.sum().backward()  # of a micro batch that has nothing to learn
    assert losses.tolist() == [0] * 6
    assert hidden.grad is not None and (hidden.grad == 0).all()


def test_a_uniform_guess_loses_the_logarithm_of_the_vocabulary() -> None:
    uniform = token_losses(torch.zeros(4, 8), lambda x: x @ torch.ones(8, 20), torch.tensor([1, 2, IGNORED, 3]))
    assert uniform.tolist() == pytest.approx([math.log(20), math.log(20), 0, math.log(20)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 36}, r"hidden_size 36 must be a multiple of 2 x num_attention_heads \(4\)"),
        ({"num_key_value_heads": 3}, r"num_attention_heads 4 must be a multiple of num_key_value_heads \(3\)"),
    ],
)
def test_heads_that_do_not_divide_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(**changes)
