"""Folders of golden values are verified: one line per case, other sizes and ids, and wrong folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aki_megatron.checkpoint.official import official_names
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.golden import verify_golden
from aki_megatron.evaluate.golden_files import GoldenFolder
from aki_megatron.model.stage import build_model
from aki_megatron.types import IGNORE, NO_SEGMENT, Modality, StackedIds

OFFICIAL = Path(__file__).parents[1] / "golden" / "official_aki"
PAD, ASSISTANT, IMAGE = 49, 40, 50

LONGROPE = RopeConfig(
    rope_type="longrope",
    theta=500.0,
    max_position_embeddings=64,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.5, 2.0, 2.5),
    long_factor=(1.2, 4.0, 9.0, 20.0),
)
CONFIG = ModelConfig(
    vision=VisionConfig(
        image_size=20, patch_size=5, hidden_size=24, num_layers=1, num_heads=2, intermediate_size=32, pooling_head=False
    ),
    resampler=ResamplerConfig(num_latents=4, num_layers=2, num_heads=2, head_dim=8, mlp_ratio=2),
    decoder=DecoderConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=40,
        padded_vocab_size=64,
        vocab_size=50,
        num_added_tokens=3,
        rope=LONGROPE,
    ),
)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a folder of this model."""
    vision, resampler, decoder = config.vision, config.resampler, config.decoder
    return {
        "vision": {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.norm_eps,
        },
        "resampler": {
            "depth": resampler.num_layers,
            "heads": resampler.num_heads,
            "dim_head": resampler.head_dim,
            "ff_mult": resampler.mlp_ratio,
            "num_latents": resampler.num_latents,
            "layer_norm_eps": resampler.norm_eps,
        },
        "lang": {
            "architecture": "Phi3ForCausalLM",
            "hidden_size": decoder.hidden_size,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "intermediate_size": decoder.intermediate_size,
            "rms_norm_eps": decoder.norm_eps,
            "embedding_rows": decoder.padded_vocab_size,
            "rope_theta": decoder.rope.theta,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": list(decoder.rope.short_factor),
                "long_factor": list(decoder.rope.long_factor),
            },
            "max_position_embeddings": decoder.rope.max_position_embeddings,
            "original_max_position_embeddings": decoder.rope.original_max_position_embeddings,
        },
        "initial_tokenizer_len": decoder.vocab_size,
        "output_vocab": decoder.total_vocab_size,
        "pad_token_id": PAD,
        "token_ids": {"<image>": IMAGE, "<|assistant|>": ASSISTANT},
    }


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model of other sizes and ids, with one case: a padded sequence with an image, then one without."""
    folder = tmp_path_factory.mktemp("golden")
    model = build_model(CONFIG, attention=AttentionConfig(rule="mma"), seed=3)
    names = official_names(CONFIG)
    save_file(
        {names[name][0]: tensor.detach() for name, tensor in model.named_parameters()}, folder / "weights.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config_json(CONFIG)))
    torch.manual_seed(0)
    text, image, response, pad = (
        int(kind) for kind in (Modality.TEXT, Modality.IMAGE, Modality.RESPONSE, Modality.PAD)
    )
    given = torch.tensor([[3, IMAGE, 7, 8, ASSISTANT, 9, 10, PAD], [3, 5, 6, 7, ASSISTANT, 8, 9, 4]])
    kinds = torch.tensor(
        [[text, *[image] * 4, text, text, text, response, response, pad], [*[text] * 5, *[response] * 3, *[pad] * 3]]
    )
    tokens = torch.tensor([[3, *[IMAGE] * 4, 7, 8, ASSISTANT, 9, 10, PAD], [*given[1].tolist(), *[PAD] * 3]])
    segments = torch.where(kinds == pad, NO_SEGMENT, 0)
    segments[0] = 0
    ids = StackedIds.stack(kinds, segments, torch.arange(11).expand(2, 11), torch.full_like(kinds, IGNORE))
    pixels = torch.randn(2, 1, 1, 3, 20, 20)  # the second sequence's is not used
    with torch.no_grad():
        logits = model.logits(tokens, ids, {Modality.IMAGE: pixels[0, 0]})[kinds != pad]
    cases = {
        "input_ids": given,
        "attention_mask": (given != PAD).long(),
        "pixel_values": pixels,
        "logits": logits[:, [0, 5, 51]],
        "valid": kinds != pad,
        "spans": torch.tensor([[1, 5, 7, 10], [-1, -1, -1, 8]]),
    }
    recorded = {f"mine/{name}": tensor for name, tensor in cases.items()} | {"logit_columns": torch.tensor([0, 5, 51])}
    save_file(recorded, folder / "cases.safetensors")
    return folder


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a folder with changed records."""
    records = load_file(folder / "cases.safetensors")
    change(records)
    for name in ("config.json", "weights.safetensors"):
        (out / name).write_bytes((folder / name).read_bytes())
    save_file(records, out / "cases.safetensors")
    return out


def test_the_official_folder_is_reproduced_a_line_per_case() -> None:
    lines: list[str] = []
    assert verify_golden(OFFICIAL, lines.append)
    assert len(lines) == 9 and all(": ok  " in line for line in lines[:8])
    assert lines[-1] == "8 of 8 cases reproduced"
    first = lines[0].split(": ok  ")
    assert first[0] == "case1_sft" and {"expanded_mask equal", "logits_argmax equal"} <= set(first[1].split(", "))
    assert any(part.startswith("grad_norm of 96 ") and float(part.split()[-1]) < 1e-4 for part in first[1].split(", "))


def test_a_folder_of_other_sizes_and_ids(other: Path) -> None:
    assert GoldenFolder(other).config == CONFIG
    lines: list[str] = []
    assert verify_golden(other, lines.append)
    assert len(lines) == 2 and lines[0].startswith("mine: ok  valid equal, spans equal, logits ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", lambda logits: logits + 6e-4, "logits 6.0e-04 ABOVE 5e-04"),
        ("logits", lambda logits: logits * float("nan"), "logits nan ABOVE"),
        ("logits", lambda logits: logits[:, :2], "logits inf ABOVE"),
        ("valid", lambda valid: ~valid, "valid 22 ENTRIES DIFFER"),
    ],
)
def test_a_number_that_is_not_reproduced(
    name: str, change: Callable[[Tensor], Tensor], message: str, other: Path, tmp_path: Path
) -> None:
    lines: list[str] = []

    def apply(records: dict[str, Tensor]) -> None:
        records[f"mine/{name}"] = change(records[f"mine/{name}"]).contiguous()

    assert not verify_golden(changed(other, tmp_path, apply), lines.append)
    assert lines[0].startswith("mine: FAILED  ") and message in lines[0]
    assert lines[1] == "0 of 1 cases reproduced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records.pop("mine/input_ids"), "mine/input_ids or logit_columns is missing"),
        (lambda records: records.update({"mine/colour": torch.zeros(1)}), "Not known how to compute colour; known"),
        (
            lambda records: [records.pop(f"mine/{n}") for n in ("logits", "valid", "spans")],
            "a case that records nothing",
        ),
        (lambda records: [records.pop(name) for name in list(records) if "/" in name], "records no case"),
    ],
)
def test_records_that_prove_nothing_are_refused(
    change: Callable[[dict[str, Tensor]], Any], message: str, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        verify_golden(changed(other, tmp_path, change), print)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("cases.safetensors", None, "no folder of golden values: cases.safetensors missing"),
        ("cases.safetensors", "text", "cases.safetensors is not readable"),
        ("weights.safetensors", "text", "weights.safetensors is not a readable safetensors file"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", json.dumps(config_json(CONFIG) | {"vision": {}}), "config.json is incomplete .*_size"),
        (
            "config.json",
            json.dumps(config_json(CONFIG) | {"output_vocab": 51}),
            "shape mismatch: lang_model.*additional",
        ),
        (
            "config.json",
            json.dumps(config_json(CONFIG) | {"lang": {"architecture": "LlamaForCausalLM"}}),
            "the official release is a Phi3ForCausalLM",
        ),
    ],
)
def test_a_folder_of_another_form_is_refused(
    file: str, content: str | None, message: str, other: Path, tmp_path: Path
) -> None:
    folder = changed(other, tmp_path, lambda records: None)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        verify_golden(folder, print)
