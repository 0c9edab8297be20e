"""The masks of the official AKI release, entry by entry, padding queries and keys included."""

from pathlib import Path

import pytest
import torch
from attention_samples import CAUSAL, CCA, IMAGE, MIXED, MMA, MMA_GENERAL, PAD, RESPONSE, TEXT
from safetensors.torch import load_file
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.attention.reference_mask import reference_mask
from aki_megatron.config.attention import AttentionConfig

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

    Without an assistant marker all text after the image is a response (a caption). Positions past a
    sequence's own expanded length (a text-only sequence in a batch with images) belong to no segment.
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


def mask_of(modality: Tensor, segment: Tensor, attention: AttentionConfig = MMA) -> AttentionMask:
    supervised = torch.zeros(modality.shape, dtype=torch.bool)
    supervised[:, :-1] = modality[:, 1:] == RESPONSE
    return AttentionMask.build(modality, segment, attention, supervised=supervised)


@pytest.mark.parametrize("case", CASES)
def test_mma_is_the_mask_of_the_official_release(case: str, recorded: dict[str, Tensor]) -> None:
    ids, wanted = ids_of(case, recorded), recorded[f"{case}/expanded_mask"]
    assert torch.equal(mask_of(*ids).dense(), wanted)
    assert torch.equal(reference_mask(*ids, MMA), wanted)


@pytest.mark.parametrize("case", ["case1_sft", "case4_text_before_image", "case5_generate"])
def test_a_wrong_mask_is_not_that_of_the_official_release(case: str, recorded: dict[str, Tensor]) -> None:
    (modality, segment), wanted = ids_of(case, recorded), recorded[f"{case}/expanded_mask"]
    assert not torch.equal(mask_of(modality, segment, CAUSAL).dense(), wanted)
    for attention in (MMA_GENERAL, MIXED, CCA):
        assert not torch.equal(mask_of(modality, segment, attention).dense(), wanted)
    start, _, assistant, _ = recorded[f"{case}/spans"][0].tolist()
    lost, earlier, later = modality.clone(), modality.clone(), modality.clone()
    lost[0, start + 3] = TEXT
    earlier[0, assistant] = RESPONSE
    assert not torch.equal(mask_of(lost, segment).dense(), wanted)
    assert not torch.equal(mask_of(earlier, segment).dense(), wanted)
    if (modality[0] == RESPONSE).any():
        later[0, assistant + 1] = TEXT
        assert not torch.equal(reference_mask(later, segment, MMA), wanted)
