"""Scenes keep their rules, and the pictures show what the scenes say."""

import numpy as np
import pytest

from aki_megatron.errors import DataError
from aki_megatron.synthetic.questions import caption, read_caption
from aki_megatron.synthetic.scenes import (
    CELL_PIXELS,
    COLORS,
    GRID,
    IMAGE_PIXELS,
    KINDS,
    LETTERS,
    PLACES,
    draw_scene,
    paint,
    scene_rng,
)

SCENES = [draw_scene(scene_rng(7, "train", index)) for index in range(1500)]


def test_every_scene_keeps_the_rules() -> None:
    for scene in SCENES:
        assert 3 <= len(scene.objects) <= 6
        cells = [(thing.row, thing.column) for thing in scene.objects]
        assert cells == sorted(set(cells)), "raster order, one object per cell"
        assert len({thing.name for thing in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            assert thing.kind in KINDS and thing.color in COLORS
            assert 0 <= thing.row < GRID and 0 <= thing.column < GRID


def test_draws_have_the_intended_frequencies() -> None:
    things = [thing for scene in SCENES for thing in scene.objects]
    assert np.mean([len(scene.objects) for scene in SCENES]) == pytest.approx(4.5, abs=0.1)
    assert np.mean([thing.kind in LETTERS for thing in things]) == pytest.approx(0.3, abs=0.02)
    for color in COLORS:
        assert np.mean([thing.color == color for thing in things]) == pytest.approx(1 / len(COLORS), abs=0.02)
    for place in PLACES:
        assert np.mean([thing.place == place for thing in things]) == pytest.approx(1 / len(PLACES), abs=0.015)


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    assert SCENES[40] == draw_scene(scene_rng(7, "train", 40))
    others = [draw_scene(scene_rng(*which)) for which in ((8, "train", 40), (7, "val", 40), (7, "train", 41))]
    assert len({SCENES[40], *others}) == 4


def test_pictures_are_painted_alike_every_time_and_stay_in_their_cells() -> None:
    for index, scene in enumerate(SCENES[:100]):
        first, second = (paint(scene, np.random.default_rng(index)) for _ in range(2))
        assert first.shape == (IMAGE_PIXELS, IMAGE_PIXELS, 3) and first.dtype == np.uint8
        np.testing.assert_array_equal(first, second)
        occupied = {(thing.row, thing.column): thing for thing in scene.objects}
        cells = first.astype(float).reshape(GRID, CELL_PIXELS, GRID, CELL_PIXELS, 3).swapaxes(1, 2)
        for row in range(GRID):
            for column in range(GRID):
                spread = cells[row, column].max(axis=(0, 1)) - cells[row, column].min(axis=(0, 1))
                # noise has a standard deviation of 8: about 50 from the darkest to the brightest of 144 pixels
                assert ((row, column) in occupied) == (spread.max() > 75)


def test_brightest_pixels_of_a_cell_have_the_color_of_its_object() -> None:
    strong = {"red": (0,), "green": (1,), "blue": (2,), "yellow": (0, 1), "cyan": (1, 2)}
    for index, scene in enumerate(SCENES[:100]):
        picture = paint(scene, np.random.default_rng(index)).astype(float)
        for thing in scene.objects:
            x, y, width, height = thing.cell_box
            pixels = picture[y : y + height, x : x + width].reshape(-1, 3)
            vivid = pixels[np.argsort(np.ptp(pixels, axis=1))[-10:]].mean(axis=0)
            bright = tuple(np.flatnonzero(vivid > 0.65 * vivid.max()))
            assert bright == strong[thing.color]


def test_captions_name_everything_and_are_read_back() -> None:
    for scene in SCENES:
        text = caption(scene)
        assert read_caption(text) == scene
        assert all(f"{thing.place} ({thing.name})" in text for thing in scene.objects)


@pytest.mark.parametrize("text", ["", "A cat.", "top (red cat).", "top (pink circle).", "over (red circle)."])
def test_other_captions_are_refused_in_words(text: str) -> None:
    with pytest.raises(DataError, match="Not the caption of a drawn scene"):
        read_caption(text)
