"""Every kind of file gives the colours that are meant, whole and reduced: Pillow is the reference, the truth where it clips."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageCms, ImageOps

from tests.vision_server import icc_profiles as icc
from tests.vision_server.tiff_files import tiff
from vision_server.decoders import ImageFile
from vision_server.errors import ImageUnreadable


def picture(width: int = 61, height: int = 43) -> Pillow.Image:
    """No symmetry, so that a turn or a swap of colours shows; smooth, so that JPEG keeps it."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1)
    return Pillow.fromarray(rgb.astype(np.uint8))


def saved(image: Pillow.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decode(content: bytes, reduction: int = 1) -> np.ndarray:
    with ImageFile(content) as file:
        rgb = file.decode(reduction)
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.flags.c_contiguous
    return rgb


def opened(content: bytes) -> Pillow.Image:
    return Pillow.open(io.BytesIO(content))


def off_by(rgb: np.ndarray, reference: Pillow.Image | np.ndarray) -> int:
    return int(np.abs(rgb.astype(int) - np.asarray(reference)).max())


def in_srgb(image: Pillow.Image, profile: bytes) -> Pillow.Image:
    """What Pillow makes of it."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None
    return converted


# Colour profiles


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("profile", [icc.DISPLAY_P3, icc.ADOBE_RGB, icc.WIDE_WITH_TABLES, icc.SCANNER])
def test_a_colour_profile_is_heeded(form: str, profile: bytes) -> None:
    options = {"quality": 95} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    content = saved(picture(), form, icc_profile=profile, **options)
    as_stored = opened(content).convert("RGB")
    meant = in_srgb(as_stored, profile)
    assert off_by(np.asarray(as_stored), meant) > 20
    assert off_by(decode(content), meant) <= 2


def test_a_profile_that_is_srgb_changes_nothing() -> None:
    for profile in (icc.SRGB, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        assert off_by(decode(saved(picture(), "PNG", icc_profile=profile)), picture()) == 0


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "L"), ("PNG", "L"), ("PNG", "LA")])
def test_a_grey_profile_is_heeded(form: str, mode: str) -> None:
    grey = picture().convert("L")
    content = saved(grey.convert(mode), form, icc_profile=icc.GREY_GAMMA_1)
    meant = in_srgb(opened(content).convert("L"), icc.GREY_GAMMA_1)
    assert off_by(decode(content), meant) <= 1
    assert off_by(decode(content), grey.convert("RGB")) > 20


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_press_profile_is_heeded(form: str) -> None:
    content = saved(picture().convert("CMYK"), form, icc_profile=icc.PRESS)
    stored = opened(content)
    meant = in_srgb(stored, icc.PRESS)
    assert off_by(np.asarray(stored.convert("RGB")), meant) > 20
    assert off_by(decode(content), meant) <= 1


def test_transparency_and_a_profile_go_together() -> None:
    image = picture().convert("RGBA")
    image.putalpha(Pillow.linear_gradient("L").resize(image.size))
    meant = Pillow.new("RGBA", image.size, "white")
    meant.alpha_composite(Pillow.merge("RGBA", (*in_srgb(picture(), icc.ADOBE_RGB).split(), image.getchannel("A"))))
    assert off_by(decode(saved(image, "PNG", icc_profile=icc.ADOBE_RGB)), meant.convert("RGB")) <= 2


@pytest.mark.parametrize(
    "profile",
    [b"no profile", icc.ADOBE_RGB[:200], icc.GREY_GAMMA_1, icc.PRESS, icc.ADOBE_RGB + bytes(4_000_000)],
    ids=["junk", "cut", "for grey", "for a press", "huge"],
)
def test_a_profile_that_is_broken_or_for_other_pixels_is_ignored(profile: bytes) -> None:
    content = saved(picture(), "JPEG", quality=95, icc_profile=profile)
    assert off_by(decode(content), opened(content).convert("RGB")) == 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([icc.DISPLAY_P3, icc.WIDE_WITH_TABLES, icc.GREY_GAMMA_1, icc.PRESS, icc.SCANNER]), st.data())
def test_a_hostile_profile_never_stops_a_picture(profile: bytes, data: st.DataObject) -> None:
    hostile = bytearray(profile)
    for _ in range(data.draw(st.integers(1, 8))):
        hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    for mode in ("RGB", "L", "CMYK"):
        content = saved(picture(9, 7).convert(mode), "TIFF", icc_profile=bytes(hostile))
        assert decode(content).shape == (7, 9, 3)


# Kinds of pixels


def test_cmyk_without_a_profile_is_the_references() -> None:
    for form in ("JPEG", "TIFF"):
        content = saved(picture().convert("CMYK"), form)
        assert off_by(decode(content), opened(content).convert("RGB")) == 0


def test_a_jpeg_of_adobes_ycck_is_the_references() -> None:
    # TurboJPEG turns CMYK into YCCK; Adobe's programs store inks upside down
    inks = 255 - np.asarray(picture().convert("CMYK"))
    content = simplejpeg.encode_jpeg(np.ascontiguousarray(inks), 95, "CMYK", "444")
    assert opened(content).info["adobe_transform"] == 2
    assert off_by(decode(content), opened(content).convert("RGB")) == 0
    assert off_by(decode(content), picture()) < 12


def test_a_mode_without_a_profile_is_the_references() -> None:
    palette = picture().quantize(200)
    for image in (palette, picture().convert("1"), picture().convert("L"), picture().convert("YCbCr")):
        content = saved(image, "TIFF" if image.mode == "YCbCr" else "PNG")
        assert off_by(decode(content), opened(content).convert("RGB")) == 0


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("TIFF", "LA")]
)
def test_what_is_half_transparent_lies_on_white(form: str, mode: str) -> None:
    image = picture().convert("RGBA")
    image.putalpha(Pillow.linear_gradient("L").resize(image.size))
    image = image.quantize(100) if mode == "P" else image.convert(mode)
    content = saved(image, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    stored = opened(content).convert("RGBA")
    meant = Pillow.new("RGBA", stored.size, "white")
    meant.alpha_composite(stored)
    assert off_by(decode(content), meant.convert("RGB")) <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_a_colour_that_stands_for_transparent_is_white(mode: str) -> None:
    image = Pillow.new("RGB", (4, 4), (0, 0, 0)).convert(mode)
    content = saved(image, "PNG", transparency=(0, 0, 0) if mode == "RGB" else 0)
    assert (decode(content) == 255).all()


def png(pixels: np.ndarray, colour_type: int, bits: int = 16) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep(samples: int) -> np.ndarray:
    values = np.random.default_rng(samples).integers(0, 1 << 16, (7, 10, samples), np.uint16)
    return values[..., 0] if samples == 1 else values


def test_16_bit_png_keeps_the_upper_8() -> None:
    grey, grey_alpha, rgb, rgba = deep(1), deep(2), deep(3), deep(4)
    assert np.array_equal(decode(png(grey, 0)), np.repeat(grey[..., None] >> 8, 3, 2))
    assert np.array_equal(decode(png(rgb, 2)), rgb >> 8)
    for pixels, colour_type in ((grey_alpha, 4), (rgba, 6)):
        alpha = pixels[..., -1:] / 65535
        truth = pixels[..., :-1] / 65535 * alpha + 1 - alpha
        assert off_by(decode(png(pixels, colour_type)), np.broadcast_to(truth * 255, (7, 10, 3))) <= 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_keeps_the_upper_8(order: str) -> None:
    grey, rgb, cmyk = deep(1), deep(3), deep(4)
    assert np.array_equal(decode(tiff(grey, order=order)), np.repeat(grey[..., None] >> 8, 3, 2))
    assert np.array_equal(decode(tiff(rgb, order=order, photometric=2)), rgb >> 8)
    inks = Pillow.frombytes("CMYK", (10, 7), (cmyk >> 8).astype(np.uint8).tobytes())
    assert off_by(decode(tiff(cmyk, order=order, photometric=5)), inks.convert("RGB")) == 0
    eight = (rgb >> 8).astype(np.uint8)
    assert np.array_equal(decode(tiff(eight, order=order, bits=8, photometric=2)), eight)


def test_a_16_bit_tiff_as_opencv_compresses_it() -> None:
    rgb = deep(3)
    assert np.array_equal(decode(cv2.imencode(".tiff", rgb[..., ::-1])[1].tobytes()), rgb >> 8)


def test_12_bits_and_white_for_zero_are_not_taken_for_darkness() -> None:
    grey = deep(1)
    assert np.array_equal(decode(tiff(grey >> 4, bits=12))[..., 1], grey >> 8)
    assert np.array_equal(decode(tiff(grey, photometric=0))[..., 1], 255 - (grey >> 8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.full((4, 4), 0.5), bits=32, sample_format=3), "floating-point"),
        (tiff(np.full((4, 4), 5), bits=32), "32-bit"),
        (tiff(np.full((4, 4), -5), bits=16, sample_format=2), "signed"),
        (saved(Pillow.new("LAB", (4, 4)), "TIFF"), "LAB"),
    ],
)
def test_pixels_without_a_known_range_are_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ImageUnreadable, match=reason) as refused:
        decode(content)
    assert "Send" in str(refused.value)


# Kinds of files


def test_a_photo_in_several_pictures_gives_its_first() -> None:
    content = saved(picture(), "MPO", save_all=True, append_images=[Pillow.new("RGB", (61, 43))], quality=95)
    assert opened(content).format == "MPO"
    assert off_by(decode(content), opened(content).convert("RGB")) == 0


def test_the_first_frame_of_an_animation() -> None:
    frames = [Pillow.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=100, **options)
        assert opened(content).n_frames == 2
        assert (decode(content) == (255, 0, 0)).all()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_is_the_references(mode: str, progressive: bool, subsampling: str) -> None:
    image = picture(203, 101).convert(mode)
    content = saved(image, "JPEG", quality=90, progressive=progressive, subsampling=subsampling)
    assert off_by(decode(content), opened(content).convert("RGB")) == 0


def test_a_jpeg_with_an_odd_sampling_is_the_references() -> None:
    # given: red-difference sampled in rows and blue-difference in columns, which libjpeg-turbo has no name for
    width, height = 203, 101
    y, x = np.mgrid[0:height, 0:width]
    planes = [(0x22, x), (0x21, y[::2] * 2), (0x12, (x + y)[:, ::2])]
    scans = [saved(Pillow.fromarray(plane.astype(np.uint8)), "JPEG", quality=90) for _, plane in planes]
    grey = scans[0]
    frame_at, scan_at = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    content = grey[:frame_at] + b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3)
    content += b"".join(bytes([number, sampling, 0]) for number, (sampling, _) in enumerate(planes))
    content += grey[frame_at + 13 : scan_at]
    for number, scan in enumerate(scans):
        content += b"\xff\xda" + struct.pack(">HBBB", 8, 1, number, 0) + scan[scan.index(b"\xff\xda") + 7 : -2]
    content += b"\xff\xd9"
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg(content)
    # then: Pillow's decoder takes over, and a profile is heeded once
    assert off_by(decode(content), opened(content).convert("RGB")) == 0
    assert decode(content, 2).shape == (51, 102, 3)
    profile = b"ICC_PROFILE\0\1\1" + icc.ADOBE_RGB
    with_profile = content[:2] + b"\xff\xe2" + struct.pack(">H", len(profile) + 2) + profile + content[2:]
    assert off_by(decode(with_profile), in_srgb(opened(content).convert("RGB"), icc.ADOBE_RGB)) <= 2


@pytest.mark.parametrize("orientation", [0, 9, 99])
def test_an_orientation_that_there_is_not_is_ignored(orientation: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    content = saved(picture(), "JPEG", exif=exif, quality=95)
    assert off_by(decode(content), opened(content).convert("RGB")) == 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        content = saved(picture(), "JPEG", exif=exif, quality=95)
        assert off_by(decode(content), opened(content).convert("RGB")) == 0


def test_scans_without_end_are_refused() -> None:
    content = saved(picture(), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    assert decode(content[:-2] + last_scan * 20 + b"\xff\xd9").shape == (43, 61, 3)
    with pytest.raises(ImageUnreadable, match="510 scans"):
        decode(content[:-2] + last_scan * 500 + b"\xff\xd9")


# Reduced


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (1001, 333), (641, 9)])
def test_a_reduced_picture_is_the_whole_one_in_small(mode: str, width: int, height: int, reduction: int) -> None:
    content = saved(picture(width, height).convert(mode), "JPEG", quality=95)
    with ImageFile(content) as file:
        size_bytes = file.size_bytes(reduction)
        small = file.decode(reduction)
    assert small.shape == (-(-height // reduction), -(-width // reduction), 3)
    assert small.nbytes == size_bytes
    rows, columns = height // reduction, width // reduction
    whole = decode(content)[: rows * reduction, : columns * reduction].astype(float)
    means = whole.reshape(rows, reduction, columns, reduction, 3).mean((1, 3))
    assert np.abs(small[:rows, :columns] - means).mean() < 2
    assert np.abs(small[:rows, :columns] - means).max() < 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(640, 320), (333, 641)])
def test_a_turned_picture_is_reduced_only_where_its_pixels_stay_whole(
    width: int, height: int, orientation: int
) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    content = saved(picture(width, height), "JPEG", exif=exif, quality=95)
    upright = ImageOps.exif_transpose(opened(content))
    with ImageFile(content) as file:
        reduction = file.reduction(40)
        assert file.upright_size_px == upright.size
        rgb = file.decode(reduction)
    # An edge that is no multiple of 8 must stay at the right or at the bottom, where half a pixel more harms nobody.
    assert reduction == (8 if width == 640 or orientation in (1, 5) else 1)
    assert rgb.shape[:2] == (-(-upright.height // reduction), -(-upright.width // reduction))
    reference = upright.resize((rgb.shape[1], rgb.shape[0]), Pillow.Resampling.BOX)
    assert off_by(rgb, reference) < 8


@pytest.mark.parametrize(
    ("width", "height", "least_px", "shorter_side", "reduction"),
    [
        (640, 480, None, False, 1),
        (640, 480, 640, False, 1),
        (1279, 960, 640, False, 1),
        (1280, 960, 640, False, 2),
        (1280, 960, 640, True, 1),
        (1280, 1280, 640, True, 2),
        (1281, 960, 640, False, 1),
        (1599, 960, 640, False, 1),
        (1600, 960, 640, False, 2),
        (2559, 100, 640, False, 2),
        (100, 2560, 640, False, 4),
        (100, 2562, 640, False, 2),
        (5120, 64, 640, False, 8),
        (6400, 64, 32, True, 2),
        (6400, 64, 5, False, 8),
        (6400, 7, 64, False, 4),
    ],
)
def test_the_side_that_counts_keeps_its_least(
    width: int, height: int, least_px: int | None, shorter_side: bool, reduction: int
) -> None:
    grey = np.zeros((height, width, 1), np.uint8)
    with ImageFile(simplejpeg.encode_jpeg(grey, colorspace="GRAY")) as file:
        assert file.reduction(least_px, shorter_side=shorter_side) == reduction
    with ImageFile(saved(Pillow.new("L", (width, height)), "PNG")) as file:
        assert file.reduction(least_px, shorter_side=shorter_side) == 1
