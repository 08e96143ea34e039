import gc
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import values
from flows.plan import (
    ZERO_STAGES,
    Sizes,
    activation_bytes,
    bytes_a_parameter,
    device_hours,
    implied_mfu,
    key_value_cache_bytes,
    largest_divisor,
    loss_bytes,
    num_layer_parameters,
    num_parameters,
    plan,
    read_sizes,
    state_bytes,
    token_flops,
)

LLAMA_2 = ("7b", "13b", "34b", "70b")
TOKENS = 2_000_000_000_000  # Llama 2, table 1


def with_profile(*names):
    return values.parse(values.compose(names, {}))


def toy(**changes):
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 10,
        "max_position_embeddings": 16,
        "tie_word_embeddings": False,
    }
    return Sizes.model_validate({**sizes, **changes})


def test_parameters_of_a_toy_counted_by_hand():
    # q and o 8x8, k and v 8x4; gate, up, down 8x12; two norms of 8
    assert num_layer_parameters(toy()) == {"attention": 64 + 64 + 32 + 32, "feed-forward": 288, "norms": 16}
    assert num_parameters(toy()) == 80 + 3 * 496 + 8 + 80
    assert num_parameters(toy(tie_word_embeddings=True)) == 80 + 3 * 496 + 8


@pytest.mark.parametrize(
    ("profile", "published"),
    [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("34b", 33_743_970_304), ("70b", 68_976_648_192)],
)
def test_the_profiles_count_what_was_published(profile, published):
    assert num_parameters(read_sizes(with_profile(profile))) == published


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
def test_parameters_are_those_of_the_module(tied, num_key_value_heads):
    sizes = toy(tie_word_embeddings=tied, num_key_value_heads=num_key_value_heads)
    assert num_parameters(sizes) == sum(each.numel() for each in module(sizes, "off", "meta").parameters())


def test_parameters_of_70b_are_those_of_the_module():
    sizes = read_sizes(with_profile("70b"))
    assert num_parameters(sizes) == sum(each.numel() for each in module(sizes, "off", "meta").parameters())


@pytest.mark.parametrize("profile", ["125m", *LLAMA_2])
def test_the_width_of_swiglu_follows_from_the_width(profile):
    model = read_sizes(with_profile(profile))
    factor, multiple = (1.3, 4096) if profile == "70b" else (1, 256)
    exact = int(factor * (4 * model.hidden_size * 2 // 3))
    assert model.intermediate_size == -(-exact // multiple) * multiple


def lasting(num_parameters, each, zero_stage, num_devices, offload=False):
    parts = state_bytes(num_parameters, each, zero_stage, num_devices, offload)
    return sum(parts.values()) - parts["gathered"]


def test_state_bytes_are_those_of_figure_1_of_the_zero_paper():
    each = {"weights": 2, "gradients": 2, "optimizer": 12}
    for stage, gigabytes in {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.9}.items():
        assert lasting(7_500_000_000, each, stage, num_devices=64) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@given(st.integers(1, 10**11), st.sampled_from(["fp32", "bf16"]), st.integers(1, 4096))
def test_a_higher_stage_never_needs_more_for_what_lasts(count, precision, devices):
    each = bytes_a_parameter(precision, zero_stage=1)
    sums = [lasting(count, each, stage, devices) for stage in ZERO_STAGES]
    assert sums == sorted(sums, reverse=True)
    if devices == 1:
        assert sums == [sum(each.values()) * count] * len(sums)


def test_all_bytes_of_a_parameter_are_counted():
    assert sum(bytes_a_parameter("bf16", 0).values()) == 2 + 2 + 4 + 4 + 4  # weight, gradient, master, two moments
    assert sum(bytes_a_parameter("bf16", 1).values()) == 2 + 4 + 4 + 4 + 4  # the gradient in fp32
    assert sum(bytes_a_parameter("fp32", 0).values()) == 4 + 4 + 4 + 4


def test_offloaded_states_take_no_memory_of_the_device():
    each = bytes_a_parameter("bf16", 2)
    assert lasting(1000, each, 2, num_devices=1, offload=True) == 1000 * (2 + 4)
    assert lasting(1000, each, 0, num_devices=1, offload=True) == lasting(1000, each, 0, num_devices=1)


@pytest.mark.parametrize(("checkpointing", "above"), [("off", 1.25), ("selective", 1.03), ("full", 1.03)])
def test_activations_are_what_the_module_keeps(checkpointing, above):
    # a CPU's norms and attention keep more than the fused kernels that the formula is for, when all is kept
    import torch

    kept = [bytes_kept(checkpointing, num_layers, torch.float32) for num_layers in (2, 4)]
    sizes = [toy(**MEASURED, num_hidden_layers=num_layers) for num_layers in (2, 4)]
    formula = [activation_bytes(each, checkpointing, MEASURED_TOKENS, bf16=False) for each in sizes]
    assert 1 <= (kept[1] - kept[0]) / (formula[1] - formula[0]) <= above


MEASURED_TOKENS = 512
MEASURED = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MEASURED_TOKENS,
}


def bytes_kept(checkpointing, num_layers, dtype):
    import torch

    from model.network.packing import documents_of

    class Kept:  # what the backward pass needs, held where the garbage collector sees it
        def __init__(self, tensor):
            self.tensor = tensor

    llama = module(toy(**MEASURED, num_hidden_layers=num_layers), checkpointing, "cpu").to(dtype)
    documents = documents_of([MEASURED_TOKENS], torch.device("cpu"))
    ids = torch.zeros(MEASURED_TOKENS, dtype=torch.long)
    weights = {weight.untyped_storage().data_ptr() for weight in llama.parameters()}
    gc.freeze()  # from here on the collector lists new objects only
    try:
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            out = llama.model(ids, documents)
        gc.collect()
        new = [each.untyped_storage() for each in gc.get_objects() if type(each) is torch.Tensor]
    finally:
        gc.unfreeze()
    assert out.shape == (MEASURED_TOKENS, MEASURED["hidden_size"])  # alive until now, and all that hangs on it
    return sum({each.data_ptr(): each.nbytes() for each in new if each.data_ptr() not in weights}.values())


def module(sizes, checkpointing, device):
    import torch

    from model.network.transformer import Llama, ModelConfig

    config = ModelConfig(**sizes.model_dump(), rms_norm_eps=1e-5, rope_theta=1e4, initializer_range=0.02)
    with torch.device(device):
        return Llama(config, checkpointing)


def test_the_loss_keeps_four_bytes_a_token_and_word():
    assert loss_bytes(vocab_size=10, num_tokens=5) == 200


def test_the_cache_of_70b_is_eight_times_smaller_with_grouped_queries():
    model = read_sizes(with_profile("70b"))
    # keys and values, 80 layers, 8 heads of 128, 4096 tokens, 2 bytes
    assert key_value_cache_bytes(model, 8, bf16=True) == 2 * 80 * 8 * 128 * 4096 * 2
    assert key_value_cache_bytes(model, 64, bf16=True) == 8 * key_value_cache_bytes(model, 8, bf16=True)


def test_flops_of_a_token_are_six_a_parameter_and_attention():
    assert token_flops(toy()) == 6 * num_parameters(toy()) + 12 * 3 * 8 * 16


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_training_measures_its_mfu_by(tied):
    from model.network.transformer import flops_per_token

    sizes = toy(tie_word_embeddings=tied)
    measured = flops_per_token(module(sizes, "off", "meta").config, sizes.max_position_embeddings)
    assert token_flops(sizes) == measured


def test_hours_and_mfu_are_each_other_s_inverse():
    assert device_hours(3600e12, peak_tflops=1, mfu=0.5) == pytest.approx(2)
    assert implied_mfu(3600e12, peak_tflops=1, hours=2) == pytest.approx(0.5)


def test_the_hours_that_meta_states_imply_between_38_and_47_percent():
    for profile, hours in {"7b": 184_320, "13b": 368_640, "34b": 1_038_336, "70b": 1_720_320}.items():
        assert with_profile(profile)["plan"]["reported_device_hours"] == hours
        flops = token_flops(read_sizes(with_profile(profile))) * TOKENS
        assert 0.38 <= implied_mfu(flops, peak_tflops=312, hours=hours) <= 0.47  # an A100's peak in bf16


def test_70b_on_2000_a100s_takes_about_45_days():
    assumed = with_profile("70b")["plan"]
    hours = device_hours(token_flops(read_sizes(with_profile("70b"))) * TOKENS, assumed["peak_tflops"], assumed["mfu"])
    assert assumed["num_devices"] == 2000
    assert hours / 2000 / 24 == pytest.approx(45, rel=0.05)


def test_45_days_of_2000_a100s_are_37_percent_for_70b():
    flops = token_flops(read_sizes(with_profile("70b"))) * TOKENS
    assert implied_mfu(flops, peak_tflops=312, hours=45 * 24 * 2000) == pytest.approx(0.37, abs=0.005)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_largest_divisor_divides_and_none_above_it_does(number, limit):
    found = largest_divisor(number, limit)
    assert number % found == 0
    assert found <= limit
    assert not any(number % other == 0 for other in range(found + 1, min(number, limit) + 1))


@pytest.mark.parametrize("profiles", [(), ("125m",), *((name,) for name in LLAMA_2)])
def test_every_profile_has_a_plan_whose_chosen_stage_fits(profiles):
    lines = plan(with_profile(*profiles)).splitlines()
    stages = next(line for line in lines if "ZeRO 0" in line)
    chosen = [part.strip() for part in stages.split("ZeRO ")[1:]]
    fits = next(line for line in lines if line.strip().startswith("fits in")).split()[-len(ZERO_STAGES) :]
    assert [fit for fit, title in zip(fits, chosen, strict=True) if title.endswith("*")] == ["yes"]


def test_a_plan_says_when_the_batch_does_not_divide_among_the_devices():
    assert "does NOT divide among 2,000 devices: at most 1,024 can train" in plan(with_profile("70b"))


def test_a_plan_imports_neither_torch_nor_deepspeed():
    code = "import sys, flows.plan; sys.exit(bool({'torch', 'deepspeed', 'prefect', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_wrong_assumption_is_named():
    with pytest.raises(ValueError, match=r"params.yaml: `plan.mfu` is 38: .*\(assumed model FLOPs utilisation\)"):
        plan({**with_profile(), "plan": {**with_profile()["plan"], "mfu": 38}})


@pytest.mark.parametrize("section", ["plan", "pretrain", "train_tokenizer", "tokenize", "machine"])
def test_a_missing_section_is_named(section):
    params = with_profile()
    del params[section]
    with pytest.raises(ValueError, match=rf"params.yaml: section `{section}` is missing"):
        plan(params)


def test_a_missing_size_is_named():
    params = with_profile()
    del params["pretrain"]["hidden_size"]
    with pytest.raises(ValueError, match=r"params.yaml: `pretrain.hidden_size` is missing"):
        plan(params)
