"""The official release's greedy generation: ids and the logits of every step."""

import pytest
import torch
from golden_aki import case, golden_model

from aki_megatron.evaluate.generate import Continuation, generate

CASES = ["case5_generate", "case5b_generate_text_before_image"]


@pytest.mark.parametrize("name", CASES)
def test_greedy_ids_and_step_logits(name: str) -> None:
    model, given = golden_model(), case(name)
    expected = given.numbers["generated_ids"].flatten()
    assert generate(model, given.batch, stop_ids=(), max_new_tokens=len(expected)) == [expected.tolist()]
    text = Continuation(model, given.batch, len(expected))
    steps = [text.start()]
    steps += [text.extend(token[None]) for token in expected[:-1]]
    logits = torch.cat(steps)
    numbers = given.numbers
    torch.testing.assert_close(logits[:, numbers["logit_columns"]], numbers["step_logits"], rtol=0, atol=5e-4)
    torch.testing.assert_close(logits.logsumexp(-1), numbers["step_logsumexp"], rtol=0, atol=5e-4)
    best = logits.topk(8)
    assert torch.equal(best.indices, numbers["step_top8_ids"])
    torch.testing.assert_close(best.values, numbers["step_top8_values"], rtol=0, atol=5e-4)
    if "step_logits_full" in numbers:
        full = numbers["step_logits_full"]
        torch.testing.assert_close(logits[: len(full), : full.shape[1]], full, rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_causal_mask_is_noticed(name: str) -> None:
    given = case(name)
    first = Continuation(golden_model("causal"), given.batch, 1).start()[0]
    assert (first[given.numbers["logit_columns"]] - given.numbers["step_logits"][0]).abs().max() > 0.1
