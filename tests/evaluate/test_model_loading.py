"""Models opened from exported folders and checkpoints; recomputed attention against transformers' own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_model import LATENTS, ask, model, template, two_turns, write_folder
from chat_folders import PHI3_LIKE

from aki_megatron.checkpoint.conversion_steps import ConversionSettings
from aki_megatron.checkpoint.conversions import from_export
from aki_megatron.checkpoint.modeling_aki import AkiForConditionalGeneration
from aki_megatron.data.image import OFFICIAL_OPTIONS
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.attention_analysis.capture import AttentionCapture, FullTable, Window
from aki_megatron.evaluate.attention_analysis.question import prefill, prompt_batch
from aki_megatron.evaluate.model_loading import load_saved_model
from aki_megatron.types import Modality


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(model("mma"), tmp_path_factory.mktemp("exported"))


def test_an_exported_folder_opens_as_the_model_that_was_exported(folder: Path, capsys: pytest.CaptureFixture) -> None:
    opened = load_saved_model(folder)
    assert opened.template.system_message == "Be brief." and opened.stage.attention.rule == "mma"
    assert opened.template.render_prompt(two_turns()) == template().render_prompt(two_turns())
    batch = prompt_batch(opened.stage, opened.template, two_turns(), opened.image_options)
    assert torch.equal(prefill(opened.stage, batch), prefill(model("mma"), batch))
    half = load_saved_model(folder, tokenizer=PHI3_LIKE, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.stage.parameters()} == {torch.bfloat16}
    assert capsys.readouterr().err == ""


def test_a_checkpoint_opens_by_itself_and_by_the_folder_around_it(folder: Path, tmp_path: Path) -> None:
    from_export(folder, tmp_path, ConversionSettings(check_logits=False))
    for path in (tmp_path, tmp_path / "step_000000"):
        opened = load_saved_model(path)
        assert opened.path == tmp_path / "step_000000" and opened.template.system_message == "Be brief."
        batch = prompt_batch(opened.stage, opened.template, ask("Is it red?"), opened.image_options)
        assert torch.equal(prefill(opened.stage, batch), prefill(model("mma"), batch))


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        load_saved_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(CheckpointError, match="not aki"):
        load_saved_model(tmp_path)


@pytest.mark.parametrize("rule", ["mma", "causal"])
def test_recomputed_attention_is_that_of_transformers(rule: str, tmp_path: Path) -> None:
    stage = model(rule)
    folder = write_folder(stage, tmp_path)
    external = AkiForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").double().eval()
    stage = stage.double()  # in fp32 the two sides' hidden states already differ by more than their probabilities
    batch = prompt_batch(stage, template(), two_turns(), OFFICIAL_OPTIONS)
    is_image = batch.modality_ids[0] == Modality.IMAGE
    window = Window(is_image.nonzero().flatten().numpy(), np.arange(len(is_image)))
    table = FullTable([window], 3, 4)
    with AttentionCapture(stage, [window], (0, 1, 2), table), torch.no_grad():
        prefill(stage, batch)
        found = external(
            input_ids=batch.token_ids,
            modality_ids=batch.modality_ids,
            pixel_values=batch.media[Modality.IMAGE].double(),
            output_attentions=True,
        )
    assert len(window.queries) == 2 * LATENTS
    for layer, attention in enumerate(found.attentions):
        torch.testing.assert_close(table.tables[0][layer], attention[0][:, window.queries].float(), rtol=0, atol=1e-6)
