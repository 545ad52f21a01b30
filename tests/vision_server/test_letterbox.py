"""The way from the original's pixels into the model's square and back, whatever was decoded of them."""

from __future__ import annotations

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_server.decoders import ImageFile
from vision_server.images import Image
from vision_server.letterbox import PADDING, Fitted, crop, fit


def ramps(width: int, height: int) -> np.ndarray:
    """Red tells the column, green the row, as a part of the picture."""
    x, y = (np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255
    red, green = np.meshgrid(x, y)
    return np.rint(np.stack([red, green, np.zeros_like(red)], -1)).astype(np.uint8)


def decoded(rgb: np.ndarray, least_px: int | None, *, shorter_side: bool = False) -> Image:
    """As Images does it, in this thread."""
    content = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), 98, "RGB", "444")
    with ImageFile(content) as file:
        reduction = file.reduction(least_px, shorter_side=shorter_side)
        return Image(file.decode(reduction), *file.upright_size_px, reduction)


def shift_px(fitted: Fitted) -> float:
    """How far (in the model's pixels, at worst) the picture lies from where `fitted` says it does."""
    side = fitted.rgb.shape[0]
    middle = slice(side // 2 - 8, side // 2 + 8)
    columns, rows = fitted.rgb[middle, :, 0].mean(0), fitted.rgb[:, middle, 1].mean(1)
    worst = 0.0
    for seen, start, size in (
        (columns, fitted.left_px, fitted.width_px),
        (rows, fitted.top_px, fitted.height_px),
    ):
        places = np.arange(side) + 0.5
        inside = (places > start + 2) & (places < start + size * fitted.scale - 2)
        slope, offset = np.polyfit(places[inside], seen[inside] / 255 * size, 1)
        ends = places[inside][[0, -1]]
        said = (ends - start) / fitted.scale
        worst = max(worst, float(np.abs(slope * ends + offset - said).max() * fitted.scale))
    return worst


@pytest.mark.parametrize("least_px", [None, 160])
@pytest.mark.parametrize(
    ("width", "height"), [(1280, 960), (1281, 967), (1287, 641), (643, 1287), (1023, 1025), (333, 500)]
)
def test_a_place_in_the_square_is_the_same_place_in_the_original(width: int, height: int, least_px: int | None) -> None:
    image = decoded(ramps(width, height), least_px)
    assert (image.reduction > 1) == (least_px is not None)
    fitted = fit(image, 160)
    assert (fitted.width_px, fitted.height_px) == (width, height)
    assert shift_px(fitted) < 0.2


@pytest.mark.parametrize("least_px", [None, 96])
@pytest.mark.parametrize(("width", "height"), [(1280, 960), (1281, 967), (643, 1287)])
def test_a_crop_shows_the_middle_of_the_original(width: int, height: int, least_px: int | None) -> None:
    image = decoded(ramps(width, height), least_px, shorter_side=True)
    assert (image.reduction > 1) == (least_px is not None)
    fitted = crop(image, 96)
    assert fitted.rgb.shape == (96, 96, 3)
    assert shift_px(fitted) < 0.2


@settings(max_examples=30, deadline=None)
@given(st.data(), st.sampled_from([128, 160, 320]), st.integers(700, 2600), st.integers(300, 2600))
def test_a_box_is_found_at_the_same_pixels_whatever_the_reduction(
    data: st.DataObject, side_px: int, width: int, height: int
) -> None:
    # given: a white box on black, at least eight of the model's pixels wide
    least = 8 * max(width, height) // side_px
    x0, y0 = data.draw(st.integers(0, width - least)), data.draw(st.integers(0, height - least))
    x1, y1 = data.draw(st.integers(x0 + least, width)), data.draw(st.integers(y0 + least, height))
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[y0:y1, x0:x1] = 255
    for least_px in (None, side_px):
        # when: it is letterboxed, found there, and mapped back as the detector's readout does
        fitted = fit(decoded(rgb, least_px), side_px)
        white = fitted.rgb[..., 0] > 127
        columns, rows = np.flatnonzero(white.any(0)), np.flatnonzero(white.any(1))
        back = [
            (columns[0] - fitted.left_px) / fitted.scale,
            (rows[0] - fitted.top_px) / fitted.scale,
            (columns[-1] + 1 - fitted.left_px) / fitted.scale,
            (rows[-1] + 1 - fitted.top_px) / fitted.scale,
        ]
        # then: every edge is where it was drawn, to one of the model's pixels
        assert np.abs(np.array(back) - (x0, y0, x1, y1)).max() <= 1.01 / fitted.scale


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([32, 64, 224]))
def test_every_shape_gives_a_full_square(width: int, height: int, side_px: int) -> None:
    image = Image(np.full((height, width, 3), 255, np.uint8), width, height)
    fitted, cut = fit(image, side_px), crop(image, side_px)
    assert fitted.rgb.shape == cut.rgb.shape == (side_px, side_px, 3)
    assert fitted.rgb.flags.c_contiguous and cut.rgb.flags.c_contiguous
    # what is not padding is the picture: its size to half a pixel, nothing smeared into the padding
    assert set(np.unique(fitted.rgb)) <= {PADDING, 255}
    filled = (fitted.rgb[..., 0] == 255).sum()
    assert filled == max(1, round(width * fitted.scale)) * max(1, round(height * fitted.scale))
    assert (cut.rgb == 255).all()


def test_a_picture_of_the_models_own_size_is_not_touched() -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for image in (Image(rgb, 64, 64), Image(rgb, 512, 512, 8)):
        assert np.shares_memory(fit(image, 64).rgb, rgb)
        assert np.array_equal(fit(image, 64).rgb, rgb)
