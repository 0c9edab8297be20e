"""The official release's numbers: masks, features, hidden states, logits, losses, gradients."""

import pytest
import torch
from golden_aki import CONFIG, Case, case, golden_model
from torch import Tensor

from aki_megatron.attention import ModalityLayout
from aki_megatron.checkpoint.official import official_names
from aki_megatron.flow import IGNORE, stack_ids
from aki_megatron.model.stage import Stage

WITH_IMAGES = [
    "case1_sft",
    "case2_caption",
    "case3_text_row_in_image_batch",
    "case4_text_before_image",
    "case6_no_assistant_row",
]
CASES = [*WITH_IMAGES, "case7_text_only_batch"]
WITH_GRADIENTS = CASES[:3]


@pytest.fixture(scope="module")
def model() -> Stage:
    return golden_model()


def hidden_and_logits(model: Stage, given: Case) -> tuple[Tensor, Tensor]:
    """At the valid places: hidden states after the last norm [M, D] and logits [M, V]."""
    kept: list[Tensor] = []
    hook = model.head.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        logits = model.logits(given.batch.token_ids, stack_ids(given.batch), given.batch.pixels)
    hook.remove()
    valid = given.numbers["valid"]
    return kept[0][valid], logits[valid]


@pytest.mark.parametrize("name", CASES)
def test_mask_is_the_recorded_one_to_the_last_entry(name: str) -> None:
    given = case(name)
    batch = given.batch
    layout = ModalityLayout.build(
        batch.modality_ids, batch.segment_ids, rule="mma", scored=batch.targets != IGNORE
    ).dense()
    assert torch.equal(layout, given.numbers["expanded_mask"])


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_image_features_and_vision_tokens(name: str, model: Stage) -> None:
    numbers = case(name).numbers
    pixels = numbers["pixel_values"].flatten(0, 2).float()
    with torch.no_grad():
        features = model.front.vision(pixels)
        tokens = model.front.resampler(features)
    torch.testing.assert_close(features, numbers["image_features"].flatten(0, 2), rtol=0, atol=5e-5)
    torch.testing.assert_close(tokens, numbers["vision_tokens"].flatten(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_and_logits(name: str, model: Stage) -> None:
    given = case(name)
    numbers = given.numbers
    hidden, logits = hidden_and_logits(model, given)
    torch.testing.assert_close(hidden, numbers["final_hidden"], rtol=0, atol=5e-4)
    torch.testing.assert_close(logits[:, numbers["logit_columns"]], numbers["logits"], rtol=0, atol=5e-4)
    torch.testing.assert_close(logits.logsumexp(-1), numbers["logits_logsumexp"], rtol=0, atol=5e-4)
    assert torch.equal(logits.argmax(-1), numbers["logits_argmax"])
    assert torch.isneginf(logits[:, CONFIG.decoder.num_tokens :]).all()


@pytest.mark.parametrize("name", CASES)
def test_loss(name: str, model: Stage) -> None:
    given = case(name)
    with torch.no_grad():
        total = model(given.batch.token_ids, stack_ids(given.batch), given.batch.pixels)
    torch.testing.assert_close(
        total / given.batch.supervised_tokens, given.numbers["loss"].squeeze(), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradient_of_every_trainable_parameter(name: str, model: Stage) -> None:
    given = case(name)
    model.zero_grad()
    (
        model(given.batch.token_ids, stack_ids(given.batch), given.batch.pixels) / given.batch.supervised_tokens
    ).backward()
    theirs = official_names(CONFIG)
    gradients = {theirs[ours]: tensor.grad for ours, tensor in model.named_parameters() if tensor.requires_grad}
    recorded = {key.removeprefix("grad_norm/") for key in given.numbers if key.startswith("grad_norm/")}
    assert gradients.keys() == recorded
    for key, gradient in gradients.items():
        expected = given.numbers[f"grad_norm/{key}"].squeeze()
        # fp64: a fp32 norm over two million numbers is itself off by 1e-4
        torch.testing.assert_close(gradient.double().norm().float(), expected, rtol=1e-4, atol=1e-7, msg=key)
    whole = [key.removeprefix("grad/") for key in given.numbers if key.startswith("grad/")]
    assert whole
    for key in whole:
        expected = given.numbers[f"grad/{key}"]
        error = (gradients[key] - expected).norm()
        assert error <= 1e-4 * expected.norm() + 1e-7, f"{key}: {error} of {expected.norm()}"


@pytest.mark.parametrize("name", ["case1_sft", "case4_text_before_image"])
def test_a_causal_mask_is_noticed(name: str) -> None:
    """The negative twin: were the rule not to reach the attention, the tests above would fail by far."""
    given = case(name)
    _, logits = hidden_and_logits(golden_model("causal"), given)
    assert (logits[:, given.numbers["logit_columns"]] - given.numbers["logits"]).abs().max() > 1


def test_a_caption_is_causal_under_either_rule() -> None:
    given = case("case2_caption")
    _, logits = hidden_and_logits(golden_model("causal"), given)
    torch.testing.assert_close(logits[:, given.numbers["logit_columns"]], given.numbers["logits"], rtol=0, atol=5e-4)
