"""The modelling file in exported folders: logits and generated tokens equal our model's, and no mask gets lost."""

from pathlib import Path

import pytest
import torch
from exported_aki import (
    DECODERS,
    IMAGE,
    LATENTS,
    RESPONSE,
    TEXT,
    batch,
    config,
    inputs,
    load,
    prompts,
    random_stage,
    random_tokens,
    write,
)
from torch import Tensor
from transformers import DynamicCache

from aki_megatron.attention import AttentionMask
from aki_megatron.checkpoint.modeling_aki import BACKENDS, AkiForConditionalGeneration, mutual_mask
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.evaluate.generate import generate
from aki_megatron.types import IGNORE, Modality, stack_ids

TOLERANCE = 1e-4
TOKENS = 42


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(random_stage(config(family)), tmp_path_factory.mktemp(family)) for family in DECODERS}


@pytest.fixture(scope="module")
def phi(folders: dict[str, Path]) -> AkiForConditionalGeneration:
    return load(folders["phi3"])


def difference(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((got - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def native_logits(family: str, rule: str = "mma") -> Tensor:
    """Logits [valid positions, V] of the prompts."""
    texts, pixels = prompts()
    model_inputs = batch(texts, torch.cat(pixels))
    logits = random_stage(config(family), rule).logits(
        model_inputs.token_ids, stack_ids(model_inputs), model_inputs.media
    )
    return logits[model_inputs.modality_ids != Modality.PAD][:, :TOKENS]


@torch.no_grad()
def exported_logits(model: AkiForConditionalGeneration, side: str) -> Tensor:
    texts, pixels = prompts()
    model_inputs = inputs(texts, torch.cat(pixels), side)
    return model(**model_inputs).logits[model_inputs["attention_mask"] == 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", DECODERS)
def test_logits_equal_our_models_under_mma(family: str, backend: str, folders: dict[str, Path]) -> None:
    """A causal mask changes them far beyond the tolerance."""
    model, expected = load(folders[family], backend), native_logits(family)
    assert model.model.language_model.config._attn_implementation == backend
    for side in ("left", "right"):
        got = exported_logits(model, side)
        assert got.shape == expected.shape
        assert difference(got, expected) <= TOLERANCE, side
    model.config.attention_rule = "causal"
    assert difference(exported_logits(model, "left"), expected) > 100 * TOLERANCE
    assert difference(exported_logits(model, "left"), native_logits(family, "causal")) <= TOLERANCE


def test_the_mask_equals_that_of_the_attention_rule() -> None:
    texts, pixels = prompts()
    given = batch(texts, torch.cat(pixels))
    ids = inputs(texts, torch.cat(pixels), "right")["modality_ids"]
    unsupervised, rule = torch.zeros_like(ids, dtype=torch.bool), AttentionConfig(rule="mma")
    expected = AttentionMask.build(given.modality_ids, given.segment_ids, rule, supervised=unsupervised)
    mask = mutual_mask(ids, torch.float32)
    valid = ids != Modality.PAD
    assert mask.shape == (len(texts), 1, *ids.shape[1:], ids.shape[1]) and mask.dtype == torch.float32
    assert torch.equal((mask == 0).squeeze(1)[valid], expected.dense()[valid])
    assert bool((mask == 0).any(-1).all()), "no query may have an empty row"
    assert mask.min() == torch.finfo(torch.float32).min, "a 0/1 mask would be added to the scores"


def test_the_loss_equals_our_models(phi: AkiForConditionalGeneration) -> None:
    texts, pixels = prompts()
    given = batch(texts, torch.cat(pixels))
    with torch.no_grad():
        expected = random_stage(config("phi3"))(given.token_ids, stack_ids(given), given.media)
        model_inputs = inputs(texts, given.media[Modality.IMAGE], "right")
        labels = model_inputs["input_ids"].masked_fill(model_inputs["modality_ids"] != RESPONSE, IGNORE)
        loss = phi(**model_inputs, labels=labels).loss
    assert difference(loss * given.supervised_tokens, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_of_a_batch_equal_our_models(family: str, backend: str, folders: dict[str, Path]) -> None:
    texts, pixels = prompts()
    stage = random_stage(config(family))
    expected = generate(stage, batch(texts, torch.cat(pixels)), stop_ids=(), max_new_tokens=10)
    assert len({tuple(answer) for answer in expected}) == len(texts)
    assert new_tokens(load(folders[family], backend), range(len(texts)), max_new_tokens=10) == expected


def new_tokens(model: AkiForConditionalGeneration, chosen: range, **settings: object) -> list[list[int]]:
    texts, pixels = prompts()
    model_inputs = inputs([texts[index] for index in chosen], torch.cat([pixels[index] for index in chosen]))
    generated = model.generate(**model_inputs, do_sample=False, pad_token_id=39, **settings)
    return generated[:, model_inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_generates_what_its_sequences_generate_alone(
    backend: str, settings: dict[str, int], folders: dict[str, Path]
) -> None:
    """Beam search repeats the images of a sequence as a group: the texts have one, none and two."""
    model = load(folders["qwen3"], backend)
    together = new_tokens(model, range(4), max_new_tokens=6, **settings)
    alone = [new_tokens(model, range(index, index + 1), max_new_tokens=6, **settings) for index in range(4)]
    assert together == [answer for answers in alone for answer in answers]
    if settings:
        assert together[:: settings.get("num_return_sequences", 1)] != new_tokens(model, range(4), max_new_tokens=6)


def test_without_a_cache_and_with_prompt_lookup(phi: AkiForConditionalGeneration) -> None:
    settings = {"max_new_tokens": 12, "eos_token_id": 38}
    expected = new_tokens(phi, range(3, 4), **settings)
    assert len(expected[0]) > 6
    assert new_tokens(phi, range(3, 4), use_cache=False, **settings) == expected
    assert new_tokens(phi, range(3, 4), prompt_lookup_num_tokens=3, **settings) == expected


@pytest.mark.parametrize("text", [20, 30, 45], ids=["outgrown", "outgrown_at_once", "long"])
def test_longrope_prompts_and_responses_beyond_the_short_factors(text: int, phi: AkiForConditionalGeneration) -> None:
    """Short factors hold for 32 positions; beyond, the cache is recomputed, images included."""
    torch.manual_seed(3)
    texts, pixels = [random_tokens((TEXT, 2), IMAGE, (TEXT, text - 5))], torch.randn(1, 3, 12, 12)
    expected = generate(random_stage(config("phi3")), batch(texts, pixels), stop_ids=(), max_new_tokens=16)
    generated = phi.generate(**inputs(texts, pixels), do_sample=False, max_new_tokens=16, pad_token_id=39)
    assert generated[:, text:].tolist() == expected


def test_longrope_factors_are_those_of_each_sequence(phi: AkiForConditionalGeneration) -> None:
    """One sequence is beyond the short factors, one outgrows them as it generates, one stays below."""
    torch.manual_seed(5)
    texts = [random_tokens((TEXT, 2), IMAGE, (TEXT, text - 5)) for text in (40, 28, 8)]
    pixels = torch.randn(3, 3, 12, 12)
    expected = generate(random_stage(config("phi3")), batch(texts, pixels), stop_ids=(), max_new_tokens=10)
    model_inputs = inputs(texts, pixels)
    generated = phi.generate(**model_inputs, do_sample=False, max_new_tokens=10, pad_token_id=39)
    assert generated[:, 40:].tolist() == expected
    with torch.no_grad():
        together = phi(**model_inputs).logits[2, -8:]
        alone = phi(**inputs(texts[2:], pixels[2:])).logits[0]
    assert difference(together, alone) <= TOLERANCE


def test_a_second_turn_continues_from_the_cache(phi: AkiForConditionalGeneration) -> None:
    texts, pixels = prompts()
    first = inputs(texts[:1], pixels[0])
    more = random_tokens((RESPONSE, 2), (TEXT, 3))
    longer = [(texts[0][0] + more[0], texts[0][1] + more[1])]
    with torch.no_grad():
        expected = phi(**inputs(longer, pixels[0])).logits[0, -5:]
        cache = phi(**first, use_cache=True).past_key_values
        mask = torch.ones(1, len(longer[0][0]), dtype=torch.long)
        got = phi(torch.tensor([more[0]]), attention_mask=mask, past_key_values=cache).logits[0]
    assert difference(got, expected) <= TOLERANCE


@pytest.mark.parametrize("backend", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_a_backend_that_would_drop_the_mask_is_refused(backend: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=f"attn_implementation='{backend}' would drop the mask.*'sdpa', 'eager'"):
        load(folders["phi3"], backend)


def test_a_backend_that_was_changed_later_is_refused(folders: dict[str, Path]) -> None:
    model = load(folders["phi3"])
    model.set_attn_implementation("eager")
    assert difference(exported_logits(model, "left"), native_logits("phi3")) <= TOLERANCE
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="attn_implementation='flex_attention' would drop the mask"):
        exported_logits(model, "left")
    with pytest.raises(ValueError, match="[Ff]lash"):
        load(folders["phi3"]).set_attn_implementation("flash_attention_2")


def test_missing_inputs_are_errors_and_never_causal(phi: AkiForConditionalGeneration) -> None:
    texts, pixels = prompts()
    model_inputs = inputs(texts, torch.cat(pixels))
    ids, mask, modality = model_inputs["input_ids"], model_inputs["attention_mask"], model_inputs["modality_ids"]
    unseen = {key: value for key, value in model_inputs.items() if key != "modality_ids"}
    for call in (phi, phi.generate):
        with pytest.raises(ValueError, match="pixel_values came without modality_ids"):
            call(**unseen)
        with pytest.raises(ValueError, match="image positions, but pixel_values hold 0 images"):
            call(input_ids=ids, attention_mask=mask)
        with pytest.raises(ValueError, match="image positions, but pixel_values hold 0 images"):
            call(input_ids=ids, attention_mask=mask, modality_ids=modality)
        with pytest.raises(ValueError, match=f"has {4 * LATENTS} image positions, but pixel_values hold 3 images"):
            call(**model_inputs | {"pixel_values": model_inputs["pixel_values"][:3]})
        with pytest.raises(ValueError, match="disagree about padding"):
            call(**model_inputs | {"attention_mask": torch.ones_like(mask)})
    with pytest.raises(ValueError, match="modality_ids .* must be those of whole sequences"):
        phi(**model_inputs | {"modality_ids": modality[:, 1:]})
    with pytest.raises(ValueError, match="the cache holds 20 tokens already"):
        phi(**model_inputs, past_key_values=phi(**model_inputs, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="A static cache"):
        phi.generate(**model_inputs, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        phi(**model_inputs | {"attention_mask": mutual_mask(modality, torch.float32)})


def test_text_alone_needs_no_modality_ids(phi: AkiForConditionalGeneration) -> None:
    texts, _ = prompts()
    tokens = torch.tensor([texts[1][0]])
    none = torch.zeros(0, 3, 12, 12)
    with torch.no_grad():
        expected = phi(**inputs(texts[1:2], none)).logits
        assert torch.equal(phi(tokens).logits, expected)
        assert torch.equal(phi(tokens, past_key_values=DynamicCache(), use_cache=True).logits, expected)
        assert difference(phi(tokens, logits_to_keep=1).logits, expected[:, -1:]) <= TOLERANCE
