"""The official release's recorded numbers, and what a mistake would change."""

from collections.abc import Callable

import pytest
import torch
from golden_aki import CONFIG, FOLDER

from aki_megatron.evaluate.golden import QuantityComparison, check_case
from aki_megatron.evaluate.golden_files import GoldenFolder
from aki_megatron.model.stage import Stage

GOLDEN = GoldenFolder(FOLDER)
POSITIONS = {"expanded_mask", "expanded_labels", "valid", "spans"}
IMAGES = {"inputs_embeds", "image_features", "vision_tokens"}
TRAINING = POSITIONS | IMAGES | {"final_hidden", "logits", "logits_logsumexp", "logits_argmax", "loss"}
GRADIENTS = {"grad_norm of 96", "grad of 7"}
STEPS = IMAGES | {"expanded_mask", "spans", "generated_ids"}
STEPS |= {"step_logits", "step_logsumexp", "step_top8_ids", "step_top8_values"}
CASES = {
    "case1_sft": TRAINING | GRADIENTS,
    "case2_caption": TRAINING | GRADIENTS,
    "case3_text_row_in_image_batch": TRAINING | GRADIENTS,
    "case4_text_before_image": TRAINING,
    "case5_generate": STEPS | {"step_logits_full"},
    "case5b_generate_text_before_image": STEPS,
    "case6_no_assistant_row": TRAINING,
    "case7_text_only_batch": TRAINING - IMAGES,
}
"""Every recorded case, and what it records."""


@pytest.fixture(scope="module")
def model() -> Stage:
    return GOLDEN.model()


def failed(comparisons: list[QuantityComparison]) -> dict[str, float]:
    return {comparison.quantity: comparison.difference for comparison in comparisons if not comparison.passed}


def test_the_folder_describes_the_recorded_model_and_every_case() -> None:
    assert GOLDEN.config == CONFIG
    assert set(GOLDEN.case_names) == CASES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_number_is_reproduced(name: str, model: Stage) -> None:
    comparisons = check_case(model, GOLDEN.case(name))
    assert failed(comparisons) == {}
    assert {comparison.quantity for comparison in comparisons} == CASES[name]


def test_every_trainable_parameter_has_a_recorded_gradient(model: Stage) -> None:
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(name.startswith("grad_norm/") for name in GOLDEN.case("case1_sft").recorded) == trainable == 96


def test_padding_of_the_vocabulary_cannot_be_predicted(model: Stage) -> None:
    logits = model.lm_head.logits(torch.randn(1, 1, CONFIG.decoder.hidden_size))
    assert torch.isneginf(logits[..., CONFIG.decoder.total_vocab_size :]).all()


@pytest.mark.parametrize("name", ["case1_sft", "case4_text_before_image", "case5_generate"])
def test_a_causal_mask_changes_the_results(name: str) -> None:
    """Negative counterpart: without the attention rule nothing after the attention is reproduced."""
    wrong = failed(check_case(GOLDEN.model("causal"), GOLDEN.case(name)))
    assert wrong.get("logits", wrong.get("step_logits", 0)) > 1
    assert not wrong.keys() & (POSITIONS | IMAGES)


@pytest.mark.parametrize("name", ["case2_caption", "case6_no_assistant_row"])
def test_a_caption_is_causal_under_either_rule(name: str) -> None:
    comparisons = check_case(GOLDEN.model("causal"), GOLDEN.case(name))
    assert ("logits" in failed(comparisons)) == (name == "case6_no_assistant_row")  # its other sequence has a response


@pytest.mark.parametrize(
    ("part", "change", "changed"),
    [
        ("lm_head.base.bias", torch.zeros_like, {"logits", "loss", "grad_norm of 96"}),
        ("lm_head.added_tokens.bias", torch.zeros_like, {"logits"}),
        ("input_embedder.token_embedding.added_tokens", torch.zeros_like, {"inputs_embeds"}),
        (
            "input_embedder.vision_encoder.norm.weight",
            torch.ones_like,
            {"image_features", "vision_tokens", "final_hidden"},
        ),
        ("input_embedder.resampler.latents", lambda latents: latents.flip(0), {"vision_tokens", "inputs_embeds"}),
        (
            "layers.2.attention.out_proj.weight",
            lambda weight: weight * 1.01,
            {"final_hidden", "grad_norm of 96", "grad of 7"},
        ),
        ("layers.0.mlp.down_proj.weight", lambda weight: weight * float("nan"), {"loss", "logits", "grad of 7"}),
    ],
)
def test_a_wrong_weight_changes_the_results(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], changed: set[str]
) -> None:
    model = GOLDEN.model()
    with torch.no_grad():
        parameter = model.get_parameter(part)
        parameter.copy_(change(parameter))
    wrong = failed(check_case(model, GOLDEN.case("case2_caption")))
    assert changed <= wrong.keys()
    assert not wrong.keys() & POSITIONS
