"""The masks of the official AKI release, entry by entry, padding rows and columns included."""

from pathlib import Path

import pytest
import torch
from attention_samples import IMAGE, PAD, RESPONSE, TEXT
from safetensors.torch import load_file
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.reference_mask import dense_mask
from aki_megatron.attention.rules import RuleOptions

GOLDEN = Path(__file__).parents[1] / "golden" / "official_aki"
CASES = (
    "case1_sft",
    "case2_caption",
    "case3_text_row_in_image_batch",
    "case4_text_before_image",
    "case5_generate",
    "case5b_generate_text_before_image",
    "case6_no_assistant_row",
    "case7_text_only_batch",
)


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors")


def ids_of(case: str, recorded: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Ids as our template would give them: prompt up to the assistant marker, response after it, PAD at the end.

    Without an assistant marker all text after the image is a response (a caption). Places past a row's own expanded
    length (a text row in a batch with images) belong to no segment.
    """
    spans, mask = recorded[f"{case}/spans"].tolist(), recorded[f"{case}/expanded_mask"]
    valid = recorded.get(f"{case}/valid", torch.ones(mask.shape[:2], dtype=torch.bool))
    text_length = recorded[f"{case}/input_ids"].shape[1]
    modality = torch.zeros(valid.shape, dtype=torch.int8)
    segment = torch.zeros(valid.shape, dtype=torch.int32)
    for b, (start, end, assistant, _) in enumerate(spans):
        first_response = assistant + 1 if assistant >= 0 else max(end, 0)
        modality[b, :first_response] = TEXT
        modality[b, first_response:] = RESPONSE
        if start >= 0:
            modality[b, start:end] = IMAGE
        segment[b, text_length + max(end - start - 1, 0) :] = -1
    return modality.masked_fill(~valid, int(PAD)), segment


def layout_of(modality: Tensor, segment: Tensor, rule: str = "mma") -> AttentionMask:
    scored = torch.zeros(modality.shape, dtype=torch.bool)
    scored[:, :-1] = modality[:, 1:] == RESPONSE
    return AttentionMask.build(modality, segment, rule=rule, scored=scored)


@pytest.mark.parametrize("case", CASES)
def test_mma_is_the_mask_of_the_official_release(case: str, recorded: dict[str, Tensor]) -> None:
    ids, wanted = ids_of(case, recorded), recorded[f"{case}/expanded_mask"]
    assert torch.equal(layout_of(*ids).dense(), wanted)
    assert torch.equal(dense_mask(*ids, "mma", RuleOptions()), wanted)


@pytest.mark.parametrize("case", ["case1_sft", "case4_text_before_image", "case5_generate"])
def test_a_wrong_mask_is_not_that_of_the_official_release(case: str, recorded: dict[str, Tensor]) -> None:
    (modality, segment), wanted = ids_of(case, recorded), recorded[f"{case}/expanded_mask"]
    assert not torch.equal(layout_of(modality, segment, "causal").dense(), wanted)
    for rule in ("mma_general", "mixed", "cca"):
        assert not torch.equal(layout_of(modality, segment, rule).dense(), wanted)
    start, _, assistant, _ = recorded[f"{case}/spans"][0].tolist()
    lost, earlier, later = modality.clone(), modality.clone(), modality.clone()
    lost[0, start + 3] = TEXT
    earlier[0, assistant] = RESPONSE
    assert not torch.equal(layout_of(lost, segment).dense(), wanted)
    assert not torch.equal(layout_of(earlier, segment).dense(), wanted)
    if (modality[0] == RESPONSE).any():
        later[0, assistant + 1] = TEXT
        assert not torch.equal(dense_mask(later, segment, "mma", RuleOptions()), wanted)
