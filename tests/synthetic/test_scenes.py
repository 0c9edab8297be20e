"""Scenes keep their rules, images show the scenes, captions name them."""

import io

import numpy as np
import pytest
import reference_answers
from PIL import Image

from aki_megatron.errors import DataError
from aki_megatron.synthetic.examples import draw_examples
from aki_megatron.synthetic.questions import parse_caption, scene_caption
from aki_megatron.synthetic.scenes import (
    CELL_NAMES,
    CELL_PIXELS,
    COLORS,
    GRID_SIZE,
    IMAGE_PIXELS,
    KINDS,
    LETTERS,
    render_scene,
    sample_scene,
    scene_rng,
)

SCENES = [sample_scene(scene_rng(7, "train", index)) for index in range(1500)]


def test_every_scene_keeps_the_rules() -> None:
    for scene in SCENES:
        assert 3 <= len(scene.objects) <= 6
        cells = [(item.row, item.column) for item in scene.objects]
        assert cells == sorted(set(cells)), "raster order, one object per cell"
        assert len({item.name for item in scene.objects}) == len(scene.objects)
        for item in scene.objects:
            assert item.kind in KINDS and item.color in COLORS
            assert 0 <= item.row < GRID_SIZE and 0 <= item.column < GRID_SIZE


def test_samples_have_the_intended_frequencies() -> None:
    items = [item for scene in SCENES for item in scene.objects]
    assert np.mean([len(scene.objects) for scene in SCENES]) == pytest.approx(4.5, abs=0.1)
    assert np.mean([item.kind in LETTERS for item in items]) == pytest.approx(0.3, abs=0.02)
    for color in COLORS:
        assert np.mean([item.color == color for item in items]) == pytest.approx(1 / len(COLORS), abs=0.02)
    for cell_name in CELL_NAMES:
        assert np.mean([item.cell_name == cell_name for item in items]) == pytest.approx(1 / len(CELL_NAMES), abs=0.015)


def test_a_scene_depends_on_seed_stream_and_index_only() -> None:
    assert SCENES[40] == sample_scene(scene_rng(7, "train", 40))
    others = [sample_scene(scene_rng(*key)) for key in ((8, "train", 40), (7, "val", 40), (7, "train", 41))]
    assert len({SCENES[40], *others}) == 4


def test_rendering_is_deterministic_and_stays_in_the_cells() -> None:
    for index, scene in enumerate(SCENES[:100]):
        first, second = (render_scene(scene, np.random.default_rng(index)) for _ in range(2))
        assert first.shape == (IMAGE_PIXELS, IMAGE_PIXELS, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
        occupied = {(item.row, item.column): item for item in scene.objects}
        cells = first.astype(float).reshape(GRID_SIZE, CELL_PIXELS, GRID_SIZE, CELL_PIXELS, 3).swapaxes(1, 2)
        for row in range(GRID_SIZE):
            for column in range(GRID_SIZE):
                spread = cells[row, column].max(axis=(0, 1)) - cells[row, column].min(axis=(0, 1))
                # noise has a standard deviation of 8: about 50 from the darkest to the brightest of 144 pixels
                assert ((row, column) in occupied) == (spread.max() > 75)


def test_brightest_pixels_of_a_cell_have_the_color_of_its_object() -> None:
    strong = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1), "cyan": (1, 2)}
    for index, scene in enumerate(SCENES[:100]):
        image = render_scene(scene, np.random.default_rng(index)).astype(float)
        for item in scene.objects:
            x, y, width, height = item.cell_box
            pixels = image[y : y + height, x : x + width].reshape(-1, 3)
            vivid = pixels[np.argsort(np.ptp(pixels, axis=1))[-10:]].mean(axis=0)
            bright = tuple(np.flatnonzero(vivid > 0.65 * vivid.max()))
            assert bright == strong[item.color]


def test_captions_name_every_object_and_parse_back() -> None:
    for scene in SCENES:
        text = scene_caption(scene)
        assert parse_caption(text) == scene
        assert all(f"{item.cell_name} ({item.name})" in text for item in scene.objects)


@pytest.mark.parametrize("text", ["", "A cat.", "top (red cat).", "top (pink circle).", "over (red circle)."])
def test_other_captions_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="Not the caption of a synthetic scene"):
        parse_caption(text)


def test_examples_have_right_answers_and_do_not_depend_on_their_number() -> None:
    examples = list(draw_examples(6, seed=1))
    assert examples[:2] == list(draw_examples(2, seed=1)) != list(draw_examples(2, seed=2))
    for number, example in enumerate(examples):
        rng = scene_rng(1, "val", number)
        assert parse_caption(example.caption) == sample_scene(rng)  # the scenes of a dataset's val split
        assert Image.open(io.BytesIO(example.image)).size == (IMAGE_PIXELS, IMAGE_PIXELS)
        assert len({question.task for question in example.questions}) == len(example.questions) >= 1
        for question in example.questions:
            assert question.answer == reference_answers.answer(question.task, question.text, example.caption)
