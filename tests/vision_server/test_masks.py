"""Masks: pixel for pixel those of Ultralytics, whatever form they are written in, at a bounded cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.end_to_end.pictures import generated
from vision_server import masks as module
from vision_server import torchvision_ops
from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.masks import (
    MAX_CELLS,
    MAX_POINTS,
    MAX_RUNS,
    MaskNumbers,
    ObjectMask,
    draw_masks,
    outline,
    run_lengths,
    with_masks,
)
from vision_server.requests import DetectOptions, MaskForm
from vision_server.results import Box, Detection, Found, Polygon, RunLengths
from vision_server.weights import SHIPPED

Pixels = NDArray[np.bool_]


def decoded(lengths: RunLengths) -> Pixels:
    """The pixels that run lengths stand for, (height, width)."""
    inside = np.arange(len(lengths.counts)) % 2 == 1
    return np.repeat(inside, lengths.counts).reshape(lengths.width_px, lengths.height_px).T


def filled(polygon: Polygon, width_px: int, height_px: int, fine: int = 4) -> Pixels:
    """The pixels within an outline, each split into `fine` × `fine`."""
    drawn = np.zeros((height_px * fine, width_px * fine), np.uint8)
    points = np.array(polygon.points) * fine - 0.5
    cv2.fillPoly(drawn, [np.round(points * 16).astype(np.int32)], (1,), shift=4)
    return drawn.astype(bool)


def overlap(one: Pixels, other: Pixels) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())


def circle(side: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[:side, :side] + 0.5
    return ((rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 2) ** 2).astype(np.uint8)


@st.composite
def cut_outs(draw: st.DrawFn) -> tuple[ObjectMask, int, int]:
    """A mask somewhere in an image of a few pixels: noise of any density, also solid, over the whole image too."""
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    columns, rows = draw(st.integers(1, width - left)), draw(st.integers(1, height - top))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    inside = (rng.random((rows, columns)) < draw(st.sampled_from([0.1, 0.5, 0.9, 1.0]))).astype(np.uint8)
    assume(inside.any())
    return ObjectMask(left, top, columns, rows, inside), width, height


@given(cut_outs())
@settings(max_examples=200, deadline=None)
def test_run_lengths_are_cocos_of_the_whole_image(made: tuple[ObjectMask, int, int]) -> None:
    mask, width, height = made
    whole = np.zeros((height, width), bool)
    whole[mask.top_px : mask.top_px + mask.height_px, mask.left_px : mask.left_px + mask.width_px] = mask.inside
    lengths = run_lengths(mask, width, height)
    assert (lengths.height_px, lengths.width_px) == (height, width)
    assert (decoded(lengths) == whole).all()
    # As short as can be: only the first run, of outside, may be empty.
    assert all(count > 0 for count in lengths.counts[1:])


@given(cut_outs(), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_run_lengths_of_coarse_cells_cover_their_pixels(
    made: tuple[ObjectMask, int, int], across: int, down: int
) -> None:
    mask, width, height = made
    coarse = ObjectMask(
        mask.left_px * across, mask.top_px * down, mask.width_px * across, mask.height_px * down, mask.inside
    )
    whole = np.zeros((height * down, width * across), bool)
    rows = slice(coarse.top_px, coarse.top_px + coarse.height_px)
    whole[rows, coarse.left_px : coarse.left_px + coarse.width_px] = np.kron(mask.inside, np.ones((down, across), bool))
    lengths = run_lengths(coarse, width * across, height * down)
    assert (decoded(lengths) == whole).all()
    assert all(count > 0 for count in lengths.counts[1:])


@given(cut_outs())
@settings(max_examples=200, deadline=None)
def test_an_outline_is_a_polygon_within_the_masks_rectangle(made: tuple[ObjectMask, int, int]) -> None:
    mask, width, height = made
    polygon = outline(mask)
    xs, ys = np.array(polygon.points).T
    assert len(polygon.points) >= 3
    assert mask.left_px <= xs.min() < xs.max() <= mask.left_px + mask.width_px <= width
    assert mask.top_px <= ys.min() < ys.max() <= mask.top_px + mask.height_px <= height
    # It runs around one part, give or take the cell by which it may leave the corners.
    _, _, parts, _ = cv2.connectedComponentsWithStats(mask.inside)
    edges = [(left, top, left + columns, top + rows) for left, top, columns, rows, _ in parts[1:]]
    own = np.array((xs.min(), ys.min(), xs.max(), ys.max())) - (mask.left_px, mask.top_px) * 2
    assert any((np.abs(own - part) <= 1).all() for part in edges)


def test_the_outline_of_a_rectangle_is_that_rectangle() -> None:
    polygon = outline(ObjectMask(10, 20, 30, 40, np.ones((40, 30), np.uint8)))
    assert set(polygon.points) == {(10, 20), (40, 20), (40, 60), (10, 60)}
    cell = outline(ObjectMask(3, 4, 3, 3, np.array([[0, 0, 0], [0, 0, 1], [0, 0, 0]], np.uint8)))
    assert set(cell.points) == {(5, 5), (6, 5), (6, 6), (5, 6)}


@pytest.mark.parametrize(("size_px", "points"), [(12, 20), (40, 40), (200, 100), (3000, 120)])
def test_an_outline_covers_what_its_mask_covers(size_px: int, points: int) -> None:
    mask = ObjectMask(5, 7, size_px, size_px, circle(min(size_px, 256)))
    polygon = outline(mask)
    xs, ys = np.array(polygon.points).T
    area = abs(np.sum(xs * np.roll(ys, -1) - ys * np.roll(xs, -1))) / 2
    assert area == pytest.approx(np.pi * size_px**2 / 4, rel=0.05 if size_px < 20 else 0.02)
    distances = np.hypot(xs - 5 - size_px / 2, ys - 7 - size_px / 2) * 2 / size_px
    assert distances == pytest.approx(1, abs=0.1 if size_px < 20 else 0.03)
    assert len(polygon.points) <= points


def test_the_largest_part_is_outlined() -> None:
    inside = np.zeros((30, 30), np.uint8)
    inside[1:5, 1:5] = inside[10:28, 20:29] = 1
    inside[12, 2] = 1
    assert set(outline(ObjectMask(0, 0, 30, 30, inside)).points) == {(20, 10), (29, 10), (29, 28), (20, 28)}


def test_holes_and_further_parts_are_in_run_lengths_and_not_in_outlines() -> None:
    inside = np.zeros((20, 40), np.uint8)
    inside[2:18, 2:18] = 1
    inside[6:12, 6:12] = 0
    inside[5:8, 30:33] = 1
    mask = ObjectMask(0, 0, 40, 20, inside)
    assert (decoded(run_lengths(mask, 40, 20)) == inside).all()
    assert set(outline(mask).points) == {(2, 2), (18, 2), (18, 18), (2, 18)}


# ---- from a segmenter's numbers


def numbers(count: int, side_px: int = 640, seed: int = 0) -> MaskNumbers:
    """`count` objects of noise over a whole square."""
    rng = np.random.default_rng(seed)
    shape = (8, side_px // 4, side_px // 4)
    coefficients = rng.normal(size=(1, 8)).repeat(count, 0).astype(np.float32)
    return MaskNumbers(coefficients, rng.normal(size=shape).astype(np.float32), side_px, 1.0, 0, 0)


def objects(count: int, box: Box) -> list[Detection]:
    return [Detection("star", 0, 0.5, replace(box)) for _ in range(count)]


@pytest.mark.parametrize("form", MaskForm)
def test_a_thousand_objects_in_fifty_megapixels_stay_within_bounds(form: MaskForm) -> None:
    width, height = 8660, 5773
    # 60 prototypes a side keep the test itself short.
    many = replace(numbers(1000, side_px=240), scale=240 / width, top_px=40)
    found = objects(1000, Box(0, 0, width, height))
    drawn = draw_masks(many, found, found)
    assert all(mask is not None and mask.inside.size <= MAX_CELLS * 1.01 for mask in drawn)
    answered = with_masks(found, drawn, form, width, height)
    assert len(answered) == 1000
    with_one = [one.mask for one in answered if one.mask is not None]
    amount = sum(len(mask.points if isinstance(mask, Polygon) else mask.counts) for mask in with_one)
    # The surest objects have theirs; the last one of them may go a little beyond.
    assert 1 <= len(with_one) < 1000
    assert [one.mask is not None for one in answered] == [place < len(with_one) for place in range(1000)]
    assert amount <= 1.5 * (MAX_POINTS if form is MaskForm.POLYGON else MAX_RUNS)


@pytest.mark.parametrize(
    "box", [Box(0, 0, 60_000, 1), Box(0, 0, 60_000, 700), Box(59_990, 0, 60_000, 700), Box(0, 699.5, 1, 700)]
)
def test_boxes_of_any_proportion_are_drawn(box: Box) -> None:
    whole = replace(numbers(1), prototypes=np.ones((8, 160, 160), np.float32), coefficients=np.ones((1, 8), np.float32))
    wide = replace(whole, scale=640 / 60_000, top_px=316)
    found = objects(1, box)
    [mask] = draw_masks(wide, found, found)
    if box.y_min_px == 699.5:
        assert mask is None  # no pixel begins in it
        return
    assert mask is not None
    assert (mask.width_px, mask.height_px) == (box.x_max_px - box.x_min_px, box.y_max_px - box.y_min_px)
    [answered] = with_masks(found, [mask], MaskForm.RLE, 60_000, 700)
    assert isinstance(answered.mask, RunLengths)
    assert sum(answered.mask.counts) == 60_000 * 700
    assert sum(answered.mask.counts[1::2]) == mask.width_px * mask.height_px


def test_objects_without_any_pixel_have_no_mask() -> None:
    nothing = replace(
        numbers(1), prototypes=-np.ones((8, 160, 160), np.float32), coefficients=np.ones((1, 8), np.float32)
    )
    found = objects(1, Box(10, 10, 50, 50))
    drawn = draw_masks(nothing, found, found)
    assert drawn == [None]
    assert with_masks(found, drawn, MaskForm.POLYGON, 640, 640) == tuple(found)


def test_each_object_keeps_its_mask_when_a_tracker_numbers_and_leaves_out() -> None:
    some = numbers(3)
    rng = np.random.default_rng(5)
    some = replace(some, coefficients=rng.normal(size=(3, 8)).astype(np.float32))
    found = [Detection("star", 0, 0.9, Box(10.0 * n, 5, 10.0 * n + 40, 60)) for n in range(3)]
    drawn = draw_masks(some, found, found)
    followed = [replace(found[2], track_id=7), replace(found[0], track_id=3)]
    again = draw_masks(some, found, followed)
    for place, other in ((0, 2), (1, 0)):
        one, same = again[place], drawn[other]
        assert one is not None and same is not None
        assert one.left_px == same.left_px and (one.inside == same.inside).all()


def test_masks_are_those_of_ultralytics_predict(data_dir: Path) -> None:
    torchvision_ops.install()
    from ultralytics import YOLO

    detector = Detector(SHIPPED["shapes-segmenter"], "cpu", engine="pytorch")
    detector.load()
    reference = YOLO(SHIPPED["shapes-segmenter"])
    run_overlaps, outline_overlaps = [], []
    for index, size in enumerate([(640, 480), (480, 640), (1280, 960), (320, 240)] * 2):
        rgb = np.array(generated(60 + index).image.convert("RGB").resize(size))
        image = Image(rgb, *size)
        [found] = detector.execute([DetectItem(detector.fit(image), DetectOptions(masks=MaskForm.RLE))])
        assert isinstance(found, Found) and found.masks is not None
        drawn = draw_masks(found.masks, found.detections, found.detections)
        lengths = with_masks(found.detections, drawn, MaskForm.RLE, *size)
        outlines = with_masks(found.detections, drawn, MaskForm.POLYGON, *size)
        [said] = reference.predict(
            rgb[..., ::-1],
            imgsz=detector.card.input_size_px,
            rect=False,
            conf=0.25,
            iou=0.7,
            verbose=False,
            retina_masks=True,
        )
        assert len(lengths) == len(said.masks.data)
        for one, other, mask in zip(lengths, outlines, said.masks.data.bool().numpy(), strict=True):
            assert isinstance(one.mask, RunLengths) and isinstance(other.mask, Polygon)
            run_overlaps.append(overlap(decoded(one.mask), mask))
            covered: Any = np.kron(mask, np.ones((4, 4), bool))
            outline_overlaps.append(overlap(filled(other.mask, *size), covered))
    assert len(run_overlaps) >= 16
    # Ultralytics enlarges in two steps; the outermost pixels of small objects may fall to the other side.
    assert np.mean(run_overlaps) > 0.99 and min(run_overlaps) > 0.96, sorted(run_overlaps)[:5]
    # An outline cuts the corners of pixels, which of objects of 40 pixels are 2 % or more.
    assert np.mean(outline_overlaps) > 0.97 and min(outline_overlaps) > 0.92, sorted(outline_overlaps)[:5]


def test_cells_are_the_models_own_numbers_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coarse grid and a fine one draw the same object."""
    yes = np.full((16, 16), -1.0, np.float32)
    yes[4:12, 6:10] = 1
    one = MaskNumbers(np.ones((1, 1), np.float32), yes[None], 64, 0.05, 0, 0)
    found = objects(1, Box(0, 0, 1280, 1280))
    [coarse] = draw_masks(one, found, found)
    monkeypatch.setattr(module, "MAX_CELLS", 1 << 22)
    [fine] = draw_masks(one, found, found)
    assert coarse is not None and fine is not None
    assert coarse.inside.shape == (256, 256) and fine.inside.shape == (1280, 1280)
    assert overlap(decoded(run_lengths(coarse, 1280, 1280)), decoded(run_lengths(fine, 1280, 1280))) > 0.98
