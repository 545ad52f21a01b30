"""Turns loaded pictures of any pixel mode into 8-bit RGB that means sRGB, what detectors are trained on."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow
from PIL import ImageCms

from vision_server.errors import ImageUnreadable

Pixels = npt.NDArray[np.uint8]
Convert = Callable[[Pixels], Pixels]

# Colour spaces as ICC profiles name them, with the mode that Pillow has for each.
RGB, GREY, CMYK = "RGB", "GRAY", "CMYK"
_MODES = {RGB: "RGB", GREY: "L", CMYK: "CMYK"}
_GREY_MODES = ("1", "L", "LA", "La")
_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "YCbCr")

# Profiles of printing presses have up to 2.7 MB, those of cameras and screens some kB. With the number of conversions
# that are kept, this bounds what hostile files can make the server remember.
_MAX_PROFILE_BYTES = 3_000_000
_KEPT_CONVERSIONS = 16
# Levels of 255. Nearer to sRGB than this is sRGB: JPEG itself is off by as much.
_SAME_LEVELS = 2
# Intermediate numbers take 12 bytes a pixel and more: few pixels at once stay in the processor's cache.
_STRIP_PX = 1 << 16


def to_rgb(picture: Pillow.Image) -> Pixels:
    """The colours of a loaded picture, height × width × 3, new memory; what is transparent looks white.

    Raises ImageUnreadable for pixels without a known range: floating-point, signed and 32-bit ones.
    """
    profile = picture.info.get("icc_profile")
    mode = picture.mode
    if mode == "F":
        raise ImageUnreadable("The image has floating-point pixels.", cure="Send 8 or 16 bits a channel.")
    if mode == "I":
        raise ImageUnreadable("The image has signed or 32-bit pixels.", cure="Send 8 or 16 bits a channel, unsigned.")
    if mode.startswith("I;16"):
        return to_srgb(np.repeat(_from_16_bits(picture)[..., None], 3, axis=2), profile, GREY)
    if mode == "CMYK":
        convert = _known_conversion(profile, CMYK)
        return _in_strips(convert, np.asarray(picture)) if convert else np.array(picture.convert("RGB"))
    if mode not in _GREY_MODES + _COLOUR_MODES:
        raise ImageUnreadable(f"The image has {mode} pixels.", cure="Send grey, RGB or CMYK ones.")
    space = GREY if mode in _GREY_MODES else RGB
    if not picture.has_transparency_data:
        return to_srgb(np.array(picture if mode == "RGB" else picture.convert("RGB")), profile, space)
    # As in a viewer: the hidden colour below what is transparent can be anything.
    with_alpha = picture.convert("RGBA")
    colours = to_srgb(np.array(with_alpha.convert("RGB")), profile, space)
    on_white = Pillow.new("RGB", with_alpha.size, "white")
    on_white.paste(Pillow.fromarray(colours), mask=with_alpha.getchannel("A"))
    return np.array(on_white)


def to_srgb(rgb: Pixels, profile: object, space: str) -> Pixels:
    """The same colours in sRGB; `rgb` itself where `profile` says nothing else.

    `profile` is what the file has as its ICC profile, if it has one, for pixels that were `space` (RGB or GREY) in the
    file. A broken profile, or one for other pixels, is ignored as viewers do.
    """
    convert = _known_conversion(profile, space)
    return _in_strips(convert, rgb) if convert else rgb


def _from_16_bits(picture: Pillow.Image) -> Pixels:
    """The upper 8 bits; Pillow's own conversion would clip at 255 and turn the picture white."""
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    bits = int(tags.get(258, (16,))[0])  # 12 from some scanners
    grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
    white_is_zero = tags.get(262) == 0  # Pillow heeds that with 8 bits only
    return ~grey if white_is_zero else grey


def _in_strips(convert: Convert, pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    rows = max(1, _STRIP_PX // width)
    rgb = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        rgb[top : top + rows] = convert(pixels[top : top + rows])
    return rgb


def _known_conversion(profile: object, space: str) -> Convert | None:
    # The size comes first: what is kept below holds the profile, too.
    if not isinstance(profile, bytes) or len(profile) > _MAX_PROFILE_BYTES:
        return None
    return _conversion(profile, space)


@lru_cache(_KEPT_CONVERSIONS)
def _conversion(profile: bytes, space: str) -> Convert | None:
    """How pixels of `space` become sRGB; None: they are, or the profile is of no use. Takes some 10 ms, then is kept."""
    mode = _MODES[space]
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != space:
            return None
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB")
    except Exception:  # hostile bytes meet several libraries here; whatever they say, the picture is still a picture
        return None

    def exact(pixels: Pixels) -> Pixels:
        size = (pixels.shape[1], pixels.shape[0])
        picture = Pillow.frombuffer(mode, size, np.ascontiguousarray(pixels), "raw", mode, 0, 1)
        return np.asarray(ImageCms.applyTransform(picture, transform))

    if space == CMYK:
        return exact
    if space == GREY:
        ramp = np.arange(256, dtype=np.uint8)[None]
        table = exact(ramp)
        if _alike(table, ramp[..., None]):
            return None
        return lambda rgb: cv2.LUT(rgb, table)
    levels = np.linspace(0, 255, 17).astype(np.uint8)
    samples = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    truth = exact(samples)
    if _alike(truth, samples):
        return None
    quick = _by_matrix(profile, opened)
    return quick if quick is not None and _alike(quick(samples), truth) else exact


def _alike(first: Pixels, second: Pixels) -> bool:
    return bool(np.abs(first.astype(int) - second).max() <= _SAME_LEVELS)


def _by_matrix(profile: bytes, opened: ImageCms.ImageCmsProfile) -> Convert | None:
    """The conversion of a camera's or screen's profile, which is three curves and a matrix; None for other profiles.

    Takes a fifth of LittleCMS's time, which would be ten times the decoder's (50 ms a megapixel against 10).
    """
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        to_xyz, from_xyz = _colorants(opened), np.linalg.inv(_colorants(srgb))
        curves = np.stack([_curve(profile, tag) for tag in (b"rTRC", b"gTRC", b"bTRC")], -1)[None]
        to_screen = _curve(srgb.tobytes(), b"rTRC", 1 << 12)
    except (KeyError, TypeError, ValueError, struct.error):
        return None
    matrix = (from_xyz @ to_xyz * 65535).astype(np.float32)
    linear = np.linspace(0, 1, 1 << 16)
    encode = np.rint(np.interp(linear, to_screen, np.linspace(0, 255, 1 << 12))).astype(np.uint8)[None]
    decode = curves.astype(np.float32)

    def convert(rgb: Pixels) -> Pixels:
        light = cv2.transform(cv2.LUT(rgb, decode), matrix)
        return cv2.LUT(cv2.add(light, 0, dtype=cv2.CV_16U), encode)  # type: ignore[no-any-return]

    return convert


def _colorants(opened: ImageCms.ImageCmsProfile) -> npt.NDArray[np.float64]:
    """What full red, green and blue are in XYZ, one a column."""
    known = opened.profile
    columns = (known.red_colorant, known.green_colorant, known.blue_colorant)
    return np.array([column[0] for column in columns if column is not None]).reshape(3, 3).T


def _curve(profile: bytes, name: bytes, points: int = 256) -> npt.NDArray[np.float64]:
    """How much light (0 to 1) each level stands for, as ICC.1 writes it (sections 7.3, 10.6 and 10.18).

    Raises KeyError, ValueError or struct.error for what is not there or not known.
    """
    (count,) = struct.unpack_from(">I", profile, 128)
    entries = (struct.unpack_from(">4sII", profile, 132 + 12 * index) for index in range(min(count, 100)))
    start = {tag: offset for tag, offset, _ in entries}[name]
    kind, number = struct.unpack_from(">4s4xI", profile, start)
    level = np.linspace(0, 1, points)
    if kind == b"curv":
        table = np.frombuffer(profile, ">u2", number, start + 12)
        if number <= 1:
            return level ** (table[0] / 256 if number else 1.0)
        return np.interp(level, np.linspace(0, 1, number), table / 65535)
    form = number >> 16
    if kind == b"para" and form == 0:
        return level ** _fixed(profile, start + 12, 1)[0]
    if kind == b"para" and form == 3:
        power, a, b, c, border = _fixed(profile, start + 12, 5)
        return np.where(level >= border, np.maximum(a * level + b, 0) ** power, c * level)
    raise ValueError(f"a curve of kind {kind!r} {form}")


def _fixed(profile: bytes, start: int, count: int) -> list[float]:
    return [value / 65536 for value in struct.unpack_from(f">{count}i", profile, start)]
