"""Decoding: upright RGB or a clear reason, against Pillow as the reference."""

from __future__ import annotations

import asyncio
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from serving.errors import ServiceError
from tests.vision_server import icc_profiles
from tests.vision_server.tiff_files import tiff
from vision_server.admission import Admission
from vision_server.errors import ImageEmpty, ImageError, ImageTooLarge, ImageUnreadable
from vision_server.images import Image, Images
from vision_server.requests import EncodedImage, ImageSource, RawPixels

MAX_BYTES, MAX_PIXELS = 2_000_000, 4_000_000


@pytest.fixture(scope="module")
def images() -> Iterator[Images]:
    pool = Images(threads=2, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS)
    pool.start()
    yield pool
    pool.stop()


def decode(images: Images, source: ImageSource, least_px: int | None = None, *, shorter_side: bool = False) -> Image:
    async def run() -> Image:
        with admission().enter(source.size_bytes) as place:
            return (await images.decode(source, place, least_px, shorter_side=shorter_side)).image

    return asyncio.run(run())


def admission(max_bytes: int = 1 << 30) -> Admission:
    return Admission(max_images=4, max_bytes=max_bytes, estimate_s=lambda: 1.0)


def picture(width: int = 61, height: int = 43) -> Pillow.Image:
    """No symmetry, so that a turn or a swap of colours shows."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    return Pillow.fromarray(rgb)


def encoded(image: Pillow.Image, form: str, **options: object) -> EncodedImage:
    file = io.BytesIO()
    image.save(file, form, **options)
    return EncodedImage(file.getvalue())


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {"quality": 92}),
        ("JPEG", {"quality": 80, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"quality": 90}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
    ],
)
def test_each_format_gives_the_pixels_of_the_reference(images: Images, form: str, options: dict[str, object]) -> None:
    source = encoded(picture(), form, **options)
    reference = np.asarray(Pillow.open(io.BytesIO(source.content)).convert("RGB"))
    image = decode(images, source)
    assert (image.width_px, image.height_px) == (61, 43)
    assert image.rgb.dtype == np.uint8 and image.rgb.shape == (43, 61, 3)
    assert np.abs(image.rgb.astype(int) - reference).max() <= 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(images: Images, form: str, orientation: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    source = encoded(picture(), form, exif=exif, **({"quality": 95} if form in ("JPEG", "WEBP") else {}))
    upright = ImageOps.exif_transpose(Pillow.open(io.BytesIO(source.content))).convert("RGB")
    image = decode(images, source)
    assert (image.width_px, image.height_px) == upright.size
    assert np.abs(image.rgb.astype(int) - np.asarray(upright)).max() <= 2


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_colour_modes_become_rgb(images: Images, mode: str) -> None:
    source = encoded(picture().convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    reference = np.asarray(Pillow.open(io.BytesIO(source.content)).convert("RGB"))
    assert np.array_equal(decode(images, source).rgb, reference)


def test_a_cmyk_jpeg_becomes_rgb(images: Images) -> None:
    source = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode(images, source).rgb.astype(int) - np.asarray(picture())).mean() < 12


def test_a_grey_jpeg_becomes_rgb(images: Images) -> None:
    image = decode(images, encoded(picture().convert("L"), "JPEG", quality=95))
    assert np.array_equal(image.rgb[..., 0], image.rgb[..., 2])


def test_sixteen_bits_are_scaled_and_not_clipped(images: Images) -> None:
    grey = Pillow.fromarray((np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8))
    image = decode(images, encoded(grey, "PNG"))
    assert np.array_equal(image.rgb[..., 0].ravel(), np.arange(64) * 4)


def test_what_is_transparent_looks_white(images: Images) -> None:
    see_through = Pillow.new("RGBA", (4, 4), (0, 0, 0, 0))
    see_through.putpixel((1, 1), (10, 20, 30, 255))
    image = decode(images, encoded(see_through, "PNG"))
    assert tuple(image.rgb[0, 0]) == (255, 255, 255)
    assert tuple(image.rgb[1, 1]) == (10, 20, 30)


def test_a_gif_gives_its_first_frame(images: Images) -> None:
    frames = [Pillow.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    image = decode(images, encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert tuple(image.rgb[0, 0]) == (255, 0, 0)


def test_raw_pixels_are_taken_as_they_are(images: Images) -> None:
    rgb = np.asarray(picture(5, 3))
    assert np.array_equal(decode(images, RawPixels(rgb.tobytes(), 5, 3)).rgb, rgb)


@pytest.mark.parametrize(("width", "height", "size"), [(5, 3, 44), (5, 3, 46), (0, 3, 45), (-5, -3, 45)])
def test_raw_pixels_that_do_not_add_up_are_refused(images: Images, width: int, height: int, size: int) -> None:
    with pytest.raises(ImageUnreadable):
        decode(images, RawPixels(bytes(size), width, height))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.4, 0.8])
def test_a_truncated_file_is_refused(images: Images, form: str, kept: float) -> None:
    whole = encoded(picture(), form).content
    with pytest.raises(ImageUnreadable):
        decode(images, EncodedImage(whole[: int(len(whole) * kept)]))


def test_a_truncated_jpeg_with_a_whole_thumbnail_is_refused(images: Images) -> None:
    # given: a JPEG whose header holds a small JPEG with an end of its own
    thumbnail = encoded(picture(8, 8), "JPEG").content
    comment = b"\xff\xfe" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    whole = encoded(picture(), "JPEG").content
    with pytest.raises(ImageUnreadable, match="truncated"):
        decode(images, EncodedImage(whole[:2] + comment + whole[2:-40]))


@pytest.mark.parametrize(
    "content", [b"\x00", b"not an image", b"%PDF-1.7\n", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(images: Images, content: bytes) -> None:
    with pytest.raises(ImageUnreadable):
        decode(images, EncodedImage(content, "frame.image"))


def test_zero_bytes_are_refused(images: Images) -> None:
    with pytest.raises(ImageEmpty):
        decode(images, EncodedImage(b""))


def test_too_many_bytes_are_refused_with_the_numbers(images: Images) -> None:
    with pytest.raises(ImageTooLarge) as refused:
        decode(images, EncodedImage(bytes(MAX_BYTES + 1)))
    assert refused.value.metadata["bytes"] == str(MAX_BYTES + 1)
    assert "VISION_MAX_IMAGE_BYTES" in str(refused.value)


def bomb(side_px: int) -> EncodedImage:
    """A PNG of side × side black pixels in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes((side_px // 8 + 1) * min(side_px, 64)), 9)
    return EncodedImage(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.mark.parametrize("side_px", [2001, 10_000, 60_000])
def test_a_pixel_bomb_is_refused_by_its_header(images: Images, side_px: int) -> None:
    with pytest.raises(ImageTooLarge) as refused:
        decode(images, bomb(side_px))
    assert refused.value.metadata["pixels"] == str(side_px**2)


def test_an_error_names_the_field_that_the_image_stood_in(images: Images) -> None:
    with pytest.raises(ImageError) as refused:
        decode(images, EncodedImage(b"junk", "messages[1].parts[0].image"))
    assert refused.value.field == "messages[1].parts[0].image"


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_comes_reduced_and_keeps_its_own_size(images: Images, orientation: int) -> None:
    exif = Pillow.Exif()
    exif[0x0112] = orientation
    source = encoded(picture(1280, 960), "JPEG", exif=exif)
    whole = decode(images, source)
    image = decode(images, source, 320)
    assert (image.width_px, image.height_px) == (whole.width_px, whole.height_px)
    assert image.reduction == 4 and whole.reduction == 1
    assert image.rgb.shape == (whole.height_px // 4, whole.width_px // 4, 3)
    assert decode(images, source, 320, shorter_side=True).reduction == 2


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_only_jpegs_come_reduced(images: Images, form: str) -> None:
    image = decode(images, encoded(picture(640, 480), form), 32)
    assert (image.rgb.shape, image.reduction) == ((480, 640, 3), 1)
    raw = decode(images, RawPixels(bytes(640 * 480 * 3), 640, 480), 32)
    assert (raw.rgb.shape, raw.reduction) == ((480, 640, 3), 1)


@pytest.mark.parametrize(
    ("least_px", "size_bytes"), [(None, 1280 * 960 * 3), (640, 640 * 480 * 3), (160, 160 * 120 * 3)]
)
async def test_a_place_grows_by_what_is_decoded(images: Images, least_px: int | None, size_bytes: int) -> None:
    source = encoded(picture(1280, 960), "JPEG")
    server = admission()
    with server.enter(source.size_bytes) as place:
        await images.decode(source, place, least_px)
        assert server.size_bytes == source.size_bytes + size_bytes
    assert server.size_bytes == 0


def test_without_a_gpu_that_decodes_the_cpu_does(images: Images) -> None:
    pool = Images(threads=1, max_bytes=MAX_BYTES, max_pixels=MAX_PIXELS, gpu="cuda:99")
    pool.start()
    source = encoded(picture(), "JPEG")
    for _ in range(2):  # while the GPU is looked for, and after
        assert np.array_equal(decode(pool, source).rgb, decode(images, source).rgb)
    pool.stop()


def test_a_truncated_photo_in_several_pictures_is_refused(images: Images) -> None:
    # given: the file ends in its first picture, whose header holds a whole thumbnail
    exif = Pillow.Exif()
    exif[0x9286] = b"UNICODE\0" + encoded(picture(8, 8), "JPEG").content
    whole = encoded(picture(), "MPO", save_all=True, append_images=[picture()], exif=exif).content
    opened = Pillow.open(io.BytesIO(whole))
    opened.seek(1)
    second_at = opened.offset
    assert decode(images, EncodedImage(whole[:second_at])).rgb.shape == (43, 61, 3)
    with pytest.raises(ImageUnreadable, match="truncated"):
        decode(images, EncodedImage(whole[: second_at - 40]))


def test_hostile_files_print_nothing() -> None:
    # given: what makes Pillow warn, log and let libtiff complain
    hostile = [
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 256, 4, 1 << 20, 1 << 30),
        encoded(picture(), "TIFF", compression="tiff_lzw").content.replace(b"\x80", b"\x7f"),
        encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\0").content,
        tiff(np.zeros((4, 4, 9), np.uint8), bits=8, photometric=2),
    ]
    hostile += [bytes(byte ^ (0x55 * (n % 97 == 5)) for n, byte in enumerate(content)) for content in hostile]
    program = """
import ast, asyncio, sys
from vision_server.admission import Admission
from vision_server.errors import ImageError
from vision_server.images import Images
from vision_server.requests import EncodedImage

async def main():
    images = Images(threads=1, max_bytes=10**7, max_pixels=10**7)
    images.start()
    for content in ast.literal_eval(sys.stdin.read()):
        with Admission(max_images=1, max_bytes=10**9, estimate_s=lambda: 1.0).enter(1) as place:
            try:
                await images.decode(EncodedImage(content), place)
            except ImageError:
                pass
    images.stop()

asyncio.run(main())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], input=repr(hostile), capture_output=True, text=True, timeout=100
    )
    assert (run.returncode, run.stderr, run.stdout) == (0, "", "")


def whole_files() -> list[bytes]:
    """One of each kind, small."""
    rgb = picture(17, 13)
    exif = Pillow.Exif()
    exif[0x0112] = 6
    turned = {"exif": exif, "icc_profile": icc_profiles.ADOBE_RGB}
    images = [
        *((rgb, form, {}) for form in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")),
        (rgb, "JPEG", {"progressive": True, **turned}),
        (rgb, "WEBP", turned),
        (rgb, "PNG", turned),
        (rgb, "TIFF", {"compression": "tiff_lzw", **turned}),
        (rgb, "TIFF", {"compression": "tiff_adobe_deflate"}),
        (rgb, "TIFF", {"compression": "jpeg"}),
        (rgb.convert("L"), "JPEG", {}),
        (rgb.convert("CMYK"), "JPEG", {"icc_profile": icc_profiles.PRESS}),
        (rgb.convert("CMYK"), "TIFF", {}),
        (rgb.convert("RGBA"), "PNG", {}),
        (rgb.quantize(20), "PNG", {"transparency": 3}),
        (rgb, "MPO", {"save_all": True, "append_images": [rgb]}),
        (rgb, "GIF", {"save_all": True, "append_images": [rgb.convert("1")], "transparency": 1}),
    ]
    deep = np.arange(17 * 13, dtype=np.uint16).reshape(13, 17) * 290
    files = [encoded(image, form, **options).content for image, form, options in images]
    return [*files, encoded(Pillow.fromarray(deep), "PNG").content, tiff(deep, order=">"), tiff(deep, photometric=0)]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(whole_files()), st.sampled_from([None, 4]), st.data())
def test_broken_bytes_give_an_image_or_an_image_error(
    images: Images, whole: bytes, least_px: int | None, data: st.DataObject
) -> None:
    # given: a file cut at either end or in the middle, or with flipped bytes, or both
    content = bytearray(whole)
    if data.draw(st.booleans()):
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        del content[start:end]
    for _ in range(data.draw(st.integers(0, 6))) if content else ():
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(images, EncodedImage(bytes(content)), least_px)
    except ServiceError as error:
        assert isinstance(error, ImageError)
        assert "0x" not in str(error)
    else:
        rows, columns = -(-image.height_px // image.reduction), -(-image.width_px // image.reduction)
        assert image.rgb.shape == (rows, columns, 3)
