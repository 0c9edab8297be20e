"""Images and recordings in one prompt: every layout equals one process, also where some ranks never meet a recording.

Five optimizer steps with clipping, packed rows of several turns with both modalities between the texts, micro-batches
with images alone, with recordings alone, and with neither.
"""

from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from tiny import (
    AUDIO,
    NUM_LATENTS,
    STEPS,
    Setting,
    Trained,
    difference,
    outcome,
    rank_batches,
    reference_training,
    take_steps,
    tiny_engine,
    tiny_model,
    together,
)

from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, Modality

pytestmark = pytest.mark.distributed
LIMIT = 1e-5
IMAGE, AUDIO_ID = int(Modality.IMAGE), int(Modality.AUDIO)

draw_image_batch = tiny.draw_batch


def draw_batch(step: int, number: int) -> Batch:
    """``tiny.draw_batch`` with recordings in the place of some images.

    Micro-batches of even numbers hold images alone, so that with two data ranks the first never meets a recording; in
    the fourth of every four each second item is a recording, and in odd steps every item.
    """
    batch = draw_image_batch(step, number)
    modality = batch.modality_ids.clone()
    places = (modality == IMAGE).flatten().nonzero().view(-1, NUM_LATENTS)  # a row for every item
    chosen = torch.zeros(len(places), dtype=torch.bool)
    if number % 4 == 3:
        chosen[:: 1 if step % 2 else 2] = True
    modality.view(-1)[places[chosen].flatten()] = AUDIO_ID
    media = {Modality.IMAGE: batch.media[Modality.IMAGE][~chosen]}
    if chosen.any():
        draw = torch.Generator().manual_seed(7000 * step + number)
        shape = (int(chosen.sum()), AUDIO.num_mel_bins, AUDIO.num_frames)
        media[Modality.AUDIO] = torch.randn(*shape, generator=draw)
    fields = {name: getattr(batch, name) for name in ("token_ids", "segment_ids", "position_ids", "targets")}
    return Batch(**fields, modality_ids=modality, media=media)


def setting_of(rule: str, **more) -> Setting:
    return Setting(audio=True, rule=rule, **more)


def train(topology: Topology, setting: Setting) -> Trained:
    with patch.object(tiny, "draw_batch", draw_batch):
        engine = tiny_engine(topology, setting)
        return outcome(engine, take_steps(engine, topology, range(STEPS)))


@cache
def plain(rule: str) -> Trained:
    with patch.object(tiny, "draw_batch", draw_batch):
        return reference_training(setting=setting_of(rule))


LAYOUTS = {
    "TP2 x PP2 x DP2, ZeRO-3, mma_general": (8, 2, 2, setting_of("mma_general")),
    "TP2 x PP2 x 2 virtual stages x DP2, ZeRO-3, mma": (8, 2, 2, setting_of("mma", virtual_stages=2)),
    "TP2 x DP2, ZeRO-3, mma": (4, 2, 1, setting_of("mma")),
    "DP2, ZeRO-0, mma_general": (2, 1, 1, setting_of("mma_general", zero_stage=0)),
}


@pytest.mark.parametrize(("ranks", "tensor", "pipeline", "setting"), LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_equals_one_process(run_on, record_property, ranks, tensor, pipeline, setting):
    got = together(run_on(ranks, train, setting, tensor=tensor, pipeline=pipeline))
    apart = difference(got, plain(setting.rule))
    record_property("largest_difference", apart)
    assert apart <= LIMIT


def test_the_batches_hold_what_they_should():
    """Else equality would prove nothing: both modalities in one segment, packed; ranks and batches without one."""
    with patch.object(tiny, "draw_batch", draw_batch):
        steps = [rank_batches(step, 0, 1) for step in range(STEPS)]
        assert not any(batch.num_items(Modality.AUDIO) for step in range(STEPS) for batch in rank_batches(step, 0, 2))
    batches = [batch for step in steps for batch in step]
    counts = {(batch.num_items(Modality.IMAGE) > 0, batch.num_items(Modality.AUDIO) > 0) for batch in batches}
    assert counts == {(True, True), (True, False), (False, True), (False, False)}
    segments = [
        set(batch.modality_ids[batch.segment_ids == segment].tolist())
        for batch in batches
        for segment in range(1, 1 + int(batch.segment_ids.max()))
    ]
    assert any({IMAGE, AUDIO_ID} <= kinds for kinds in segments)


def test_audio_and_the_rule_matter():
    """A negative twin: other recordings, or another rule, give other losses; the audio resampler is trained."""
    assert difference(plain("mma"), plain("mma_general")) > 1e-3
    silent = draw_batch

    def louder(step: int, number: int) -> Batch:
        batch = silent(step, number)
        for items in [batch.media[Modality.AUDIO]] if Modality.AUDIO in batch.media else []:
            items.mul_(2)
        return batch

    with patch.object(tiny, "draw_batch", louder):
        assert difference(reference_training(setting=setting_of("mma")), plain("mma")) > 1e-3
    initial = dict(tiny_model(setting_of("mma")).named_parameters())
    moved = {name for name, weight in plain("mma").weights.items() if not torch.equal(weight, initial[name])}
    names = [name for name in initial if name.startswith("input_embedder.audio_resampler.")]
    assert len(names) > 5 and moved >= set(names)
    assert not any(name.startswith("input_embedder.audio_encoder.") for name in moved)


def save(topology: Topology, setting: Setting, folder: Path) -> Trained:
    """Save after two steps and go on."""
    with patch.object(tiny, "draw_batch", draw_batch):
        engine = tiny_engine(topology, setting)
        take_steps(engine, topology, range(2))
        saver = Checkpointer(folder, keep_last=1, group=topology.new_gloo_group(60))
        saver.save(2, engine.state_dict(), {"step": 2})
        saver.wait()
        return outcome(engine, take_steps(engine, topology, range(2, STEPS)))


def resume(topology: Topology, setting: Setting, folder: Path) -> Trained:
    """Resume from there; the steps before move weights and moments away from the initial ones."""
    with patch.object(tiny, "draw_batch", draw_batch):
        engine = tiny_engine(topology, setting)
        take_steps(engine, topology, [STEPS])
        saver, tensors = Checkpointer(folder, keep_last=1), engine.state_dict()
        assert saver.load(saver.latest(), tensors) == {"step": 2}
        engine.load_state_dict(tensors)
        return outcome(engine, take_steps(engine, topology, range(2, STEPS)))


def test_saved_with_everything_resumed_elsewhere(run_on, tmp_path):
    setting = setting_of("mma_general")
    undisturbed = together(run_on(8, save, setting, tmp_path, tensor=2, pipeline=2))
    assert difference(together(run_on(2, resume, setting, tmp_path, pipeline=2)), undisturbed) <= LIMIT
