"""The official release's numbers, and that a mistake would be noticed: what the release's README says it would move."""

from collections.abc import Callable

import pytest
import torch
from golden_aki import CONFIG, FOLDER

from aki_megatron.evaluate.golden import Finding, check_case
from aki_megatron.evaluate.golden_files import Golden
from aki_megatron.model.stage import Stage

GOLDEN = Golden(FOLDER)
PLACES = {"expanded_mask", "expanded_labels", "valid", "spans"}
IMAGES = {"inputs_embeds", "image_features", "vision_tokens"}
TRAINING = PLACES | IMAGES | {"final_hidden", "logits", "logits_logsumexp", "logits_argmax", "loss"}
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


def failed(findings: list[Finding]) -> dict[str, float]:
    return {finding.quantity: finding.difference for finding in findings if not finding.passed}


def test_the_folder_describes_the_recorded_model_and_every_case() -> None:
    assert GOLDEN.config == CONFIG
    assert set(GOLDEN.cases) == CASES.keys()


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_number_is_reproduced(name: str, model: Stage) -> None:
    findings = check_case(model, GOLDEN.case(name))
    assert failed(findings) == {}
    assert {finding.quantity for finding in findings} == CASES[name]


def test_every_trainable_parameter_has_a_recorded_gradient(model: Stage) -> None:
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert sum(name.startswith("grad_norm/") for name in GOLDEN.case("case1_sft").recorded) == trainable == 96


def test_no_word_that_is_none_can_be_predicted(model: Stage) -> None:
    logits = model.head.logits(torch.randn(1, 1, CONFIG.decoder.hidden_size))
    assert torch.isneginf(logits[..., CONFIG.decoder.total_vocab_size :]).all()


@pytest.mark.parametrize("name", ["case1_sft", "case4_text_before_image", "case5_generate"])
def test_a_causal_mask_is_noticed(name: str) -> None:
    """The negative twin: were the rule not to reach the attention, nothing after it would be reproduced."""
    wrong = failed(check_case(GOLDEN.model("causal"), GOLDEN.case(name)))
    assert wrong.get("logits", wrong.get("step_logits", 0)) > 1
    assert not wrong.keys() & (PLACES | IMAGES)


@pytest.mark.parametrize("name", ["case2_caption", "case6_no_assistant_row"])
def test_a_caption_is_causal_under_either_rule(name: str) -> None:
    findings = check_case(GOLDEN.model("causal"), GOLDEN.case(name))
    assert ("logits" in failed(findings)) == (name == "case6_no_assistant_row")  # its other row has an answer


@pytest.mark.parametrize(
    ("part", "change", "noticed"),
    [
        ("head.output.bias", torch.zeros_like, {"logits", "loss", "grad_norm of 96"}),
        ("head.extra.bias", torch.zeros_like, {"logits"}),
        ("front.embedding.extra", torch.zeros_like, {"inputs_embeds"}),
        ("front.vision.norm.weight", torch.ones_like, {"image_features", "vision_tokens", "final_hidden"}),
        ("front.resampler.latents", lambda latents: latents.flip(0), {"vision_tokens", "inputs_embeds"}),
        (
            "blocks.2.attention.out.weight",
            lambda weight: weight * 1.01,
            {"final_hidden", "grad_norm of 96", "grad of 7"},
        ),
        ("blocks.0.feed_forward.down.weight", lambda weight: weight * float("nan"), {"loss", "logits", "grad of 7"}),
    ],
)
def test_a_wrong_weight_is_noticed(
    part: str, change: Callable[[torch.Tensor], torch.Tensor], noticed: set[str]
) -> None:
    model = GOLDEN.model()
    with torch.no_grad():
        parameter = model.get_parameter(part)
        parameter.copy_(change(parameter))
    wrong = failed(check_case(model, GOLDEN.case("case2_caption")))
    assert noticed <= wrong.keys()
    assert not wrong.keys() & PLACES
