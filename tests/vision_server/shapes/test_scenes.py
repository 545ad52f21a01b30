"""Scenes are what they say they are."""

import numpy as np
import pytest

from vision_server.shapes.foreign_scenes import draw_foreign_scene
from vision_server.shapes.palette import ANCHORS, COLOURS, sample_colour
from vision_server.shapes.patch_truth import patch_truth
from vision_server.shapes.scenes import DESCRIBER_STYLE, DETECTOR_STYLE, LABELS, SceneStyle, draw_scene


@pytest.mark.parametrize("style", [DESCRIBER_STYLE, DETECTOR_STYLE])
def test_a_seed_always_gives_the_same_scene(style: SceneStyle) -> None:
    first, second = (draw_scene(np.random.default_rng(5), 320, 240, style) for _ in range(2))
    assert first.shapes == second.shapes
    assert np.array_equal(first.image, second.image)


@pytest.mark.parametrize("style", [DESCRIBER_STYLE, DETECTOR_STYLE])
@pytest.mark.parametrize("size_px", [(320, 240), (200, 300)])
def test_the_truth_fits_the_picture(style: SceneStyle, size_px: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    width_px, height_px = size_px
    for _ in range(25):
        scene = draw_scene(rng, width_px, height_px, style)
        assert scene.image.shape == (height_px, width_px, 3)
        assert scene.image.dtype == np.uint8
        assert len(scene.shapes) <= style.max_shapes
        for shape in scene.shapes:
            x0, y0, x1, y1 = shape.box
            assert 0 <= x0 < x1 <= width_px
            assert 0 <= y0 < y1 <= height_px
            side = max(x1 - x0, y1 - y0) / min(size_px)
            assert style.min_side - 1e-6 <= side <= style.max_side + 1e-6
            assert shape.label in LABELS
            assert shape.colour in COLOURS
        centres = [shape.centre[0] for shape in scene.shapes]
        assert centres == sorted(centres)


def test_a_shape_has_its_colour_where_it_lies() -> None:
    plain = SceneStyle(min_shapes=1, max_shapes=1, clutter_share=0, overlap_share=0)
    rng = np.random.default_rng(7)
    for _ in range(20):
        scene = draw_scene(rng, 200, 200, plain)
        x, y = np.array(scene.shapes[0].polygon).mean(0).astype(int)
        seen = scene.image[y - 2 : y + 3, x - 2 : x + 3].mean((0, 1))
        assert np.abs(seen - np.array(scene.shapes[0].rgb)).max() < 30


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_name_has_no_foreign_hues(name: str) -> None:
    rng = np.random.default_rng(8)
    for _ in range(50):
        red, green, blue = sample_colour(rng, name)
        strongest = {"red": red, "orange": red, "green": green, "blue": blue}.get(name, max(red, green, blue))
        assert strongest == max(red, green, blue)
    assert len(ANCHORS[name]) >= 6


def test_every_shape_is_found_in_the_patch_truth() -> None:
    rng = np.random.default_rng(9)
    for _ in range(20):
        scene = draw_scene(rng, 240, 160)
        truth = patch_truth(scene, 144, 16)
        assert truth[:, 2].sum() == len(scene.shapes)
        assert set(truth[truth[:, 0] > 0, 0]) == {1 + LABELS.index(shape.label) for shape in scene.shapes}


def test_the_other_hand_is_repeatable() -> None:
    first, second = draw_foreign_scene(3), draw_foreign_scene(3)
    assert first.shapes == second.shapes
    assert first.image.tobytes() == second.image.tobytes()
    for shape in first.shapes:
        assert shape.box[0] >= 0
        assert shape.box[2] <= first.image.width
