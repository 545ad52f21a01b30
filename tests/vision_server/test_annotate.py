"""The annotated picture: everything that was found is drawn where it is, with labels that people can read."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageFont, features

from tests import programs
from tests.end_to_end.pictures import foreign
from vision_server import annotate as module
from vision_server import torchvision_ops
from vision_server.annotate import FONT, annotate
from vision_server.detector import DetectItem, Detector
from vision_server.images import Image
from vision_server.masks import ObjectMask
from vision_server.requests import DetectOptions
from vision_server.results import Box, Classification, Detection, Found, Keypoint, OrientedBox
from vision_server.shapes.scenes import LABELS
from vision_server.weights import SHIPPED

THAI = "ดาวสีแดง ที่นั่งน้ำ"
GREY = 128


def grey(width: int = 640, height: int = 480) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, np.uint8)


def opened(jpeg: bytes) -> NDArray[np.int16]:
    image = Pillow.open(io.BytesIO(jpeg))
    assert image.format == "JPEG"
    return np.array(image.convert("RGB"), np.int16)


def changed(jpeg: bytes, before: NDArray[np.uint8] | None = None) -> NDArray[np.bool_]:
    """Where the picture differs from what it was drawn on by more than JPEG's own noise."""
    after = opened(jpeg)
    return np.abs(after - (grey() if before is None else before)).max(2) > 24


def one(label: str = "star", **more: object) -> Detection:
    return replace(Detection(label, 0, 0.93, Box(200, 200, 400, 300)), **more)  # type: ignore[arg-type]


def test_a_box_is_drawn_along_its_edges_with_its_label_above() -> None:
    where = changed(annotate(grey(), [one()]))
    for edge in (where[200, 200:400], where[299:302, 200:400].any(0), where[200:300, 200]):
        assert edge.all()
    assert not where[204:297, 204:397].any()
    assert where[175:199, 200:260].mean() > 0.5
    assert not where[:, 420:].any() and not where[310:].any()


def test_a_turned_box_is_drawn_along_its_edges() -> None:
    turned = OrientedBox(300, 250, 200, 60, 30)
    where = changed(annotate(grey(), [one(oriented_box=turned)]))
    along = np.array([np.cos(np.pi / 6), np.sin(np.pi / 6)])
    across = np.array([-along[1], along[0]])
    for sign in (-1, 1):
        for part in (-0.8, 0.0, 0.8):
            for x, y in (
                (300, 250) + along * 100 * part + across * 30 * sign,
                (300, 250) + along * 100 * sign + across * 30 * part,
            ):
                assert where[int(y) - 2 : int(y) + 3, int(x) - 2 : int(x) + 3].any(), (x, y)
    assert not where[245:256, 290:311].any()


def test_masks_are_filled_so_that_the_picture_shows_through() -> None:
    inside = np.zeros((100, 200), np.uint8)
    inside[20:80, 40:160] = 1
    before = grey()
    before[230:260, 280:320] = 200
    after = opened(annotate(before, [one()], masks=[ObjectMask(200, 200, 200, 100, inside)]))
    tint = after - before
    assert (np.abs(tint[225:275, 250:350]).max(2) > 20).all()
    assert (np.abs(tint[206:216, 206:236]).max(2) < 12).all() and (np.abs(tint[285:295, 370:395]).max(2) < 12).all()
    assert after[245, 300].mean() > after[225, 250].mean() + 20  # the bright spot is still brighter


def test_named_points_are_dots() -> None:
    points = tuple(Keypoint(name, x, 250, 0.9) for name, x in (("left", 230), ("right", 370)))
    where = changed(annotate(grey(), [one(keypoints=(*points, Keypoint("unseen", 300, 250, 0.1)))]))
    assert where[250, 230] and where[250, 370]
    assert not where[245:256, 290:311].any()


def test_a_followed_object_has_its_number_before_its_label() -> None:
    def label_width(found: Detection) -> int:
        return int(changed(annotate(grey(), [found]))[180:198].any(0).sum())

    font = ImageFont.truetype(FONT, round((640 + 480) / 2 * 0.03))
    wider = label_width(one(track_id=7)) - label_width(one())
    assert wider == pytest.approx(font.getlength("#7 "), abs=3)


def test_the_likeliest_classes_stand_in_the_corner() -> None:
    classes = [
        Classification(label, number, 0.5) for number, label in enumerate(("star", "square", "circle", "triangle"))
    ]
    three, four = annotate(grey(), [], classes[:3]), annotate(grey(), [], classes)
    assert three == four
    where = changed(three)
    assert where[:70, :40].mean() > 0.5 and not where[100:].any() and not where[:, 200:].any()


def test_the_font_has_thai_and_latin_letters_and_sets_marks_above_each_other() -> None:
    font = ImageFont.truetype(FONT, 40)
    missing = bytes(font.getmask("\u4e2d"))  # no font of ours has Chinese
    letters = [
        *map(chr, range(0x21, 0x7F)),
        *map(chr, range(0xE01, 0xE3B)),
        *map(chr, range(0xE3F, 0xE5C)),
        "é",
        "×",
        "°",
    ]
    assert not [letter for letter in letters if bytes(font.getmask(letter)) == missing]
    # Pillow needs libfribidi on the machine to place marks; without it a tone mark is drawn over the vowel.
    if not features.check("raqm"):
        programs.missing("libfribidi (Debian: libfribidi0)")
    assert font.getbbox("ที่")[1] < font.getbbox("ที")[1]
    assert font.getlength("ที่") == font.getlength("ท")


def test_thai_labels_are_written() -> None:
    where = changed(annotate(grey(), [one(THAI)]))
    font = ImageFont.truetype(FONT, round((640 + 480) / 2 * 0.03))
    assert int(where[180:198].any(0).sum()) == pytest.approx(font.getlength(f"{THAI} 0.93"), abs=8)


def test_a_model_may_have_thai_names(data_dir: Path, tmp_path: Path) -> None:
    """The names are the checkpoint's own: whoever trains with Thai ones gets Thai labels, filters and pictures."""
    torchvision_ops.install()
    names = dict(enumerate(("วงกลม", "สี่เหลี่ยม", "สามเหลี่ยม", "ดาว")))
    checkpoint = torch.load(SHIPPED["shapes-detector"], weights_only=False)
    checkpoint["model"].names = names
    torch.save(checkpoint, tmp_path / "thai.pt")
    detector = Detector(tmp_path / "thai.pt", "cpu", engine="pytorch")
    assert detector.load().labels == tuple(names.values())
    shape = foreign(100, 1, 1)
    image = Image(np.array(shape.image.convert("RGB")), *shape.image.size)
    label = names[LABELS.index(shape.shapes[0].label)]
    item = DetectItem(detector.fit(image), DetectOptions(labels=(label,)), detector.class_ids((label,)))
    [found] = detector.execute([item])
    assert isinstance(found, Found)
    assert [one.label for one in found.detections] == [label]
    assert changed(annotate(image.rgb, found.detections), image.rgb).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (32, 32), (64, 48)])
def test_small_pictures_keep_their_size_and_stay_visible(size: tuple[int, int]) -> None:
    width, height = size
    whole = Box(0, 0, width, height)
    drawn = annotate(
        grey(width, height),
        [Detection(THAI, 1, 0.9, whole, keypoints=(Keypoint("middle", width / 2, height / 2, 0.9),))],
        [Classification("star", 0, 0.9)],
        [ObjectMask(0, 0, width, height, np.ones((height, width), np.uint8))],
    )
    assert opened(drawn).shape == (height, width, 3)
    # No label covers what it names.
    assert changed(drawn, grey(width, height)).any()
    if width >= 32:
        white = (opened(drawn) > 220).all(2)
        assert not white.any()


def test_a_huge_picture_is_reduced_with_all_that_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SIDE_PX", 640)
    found = one(box=Box(400, 400, 800, 600))
    mask = ObjectMask(400, 400, 400, 200, np.ones((10, 20), np.uint8))
    reduced = opened(annotate(grey(1280, 960), [found], masks=[mask]))
    assert reduced.shape == (480, 640, 3)
    assert (
        np.abs(reduced - opened(annotate(grey(), [one()], masks=[ObjectMask(200, 200, 200, 100, mask.inside)]))).max()
        < 12
    )


def test_a_picture_decoded_at_half_its_size_has_everything_in_its_place() -> None:
    half = annotate(grey(), [one(box=Box(400, 400, 800, 600))], reduction=2)
    assert half == annotate(grey(), [one()])


def test_drawing_a_thousand_objects_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [one(box=Box(0, 0, 640, 480)) for _ in range(1000)]
    masks = [ObjectMask(0, 0, 640, 480, np.ones((48, 64), np.uint8)) for _ in everything]
    written: list[str] = []
    fitting = module._fitting
    monkeypatch.setattr(module, "_fitting", lambda pen, text: written.append(text) or fitting(pen, text))
    drawn = annotate(grey(), everything, masks=masks)
    assert len(written) == 300
    # Four fills leave a little of the picture: 0.6 to the fourth.
    assert annotate(grey(), everything, masks=masks[:4]) == drawn


def test_nothing_found_is_the_picture_itself(tmp_path: Path) -> None:
    assert not changed(annotate(grey(), [])).any()
