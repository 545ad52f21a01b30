"""Small ICC profiles of known content: screens' (three curves and a matrix), grey ones and tables such as printers have."""

from __future__ import annotations

import itertools
import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
D65 = (0.3127, 0.3290)


def s15(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def table_curve(gamma: float, entries: int = 1024) -> bytes:
    table = np.rint(np.linspace(0, 1, entries) ** gamma * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", entries) + table.tobytes()


def srgb_curve() -> bytes:
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + s15(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def assembled(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + s15(*D50),
        **tags,
    }
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    device = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s6H", start + len(body), b"test", 0x02400000, device, space, pcs, 2026, 1, 1, 0, 0, 0)
    return head + b"acsp" + bytes(28) + s15(*D50) + bytes(48) + table + body


def screen(red: tuple[float, float], green: tuple[float, float], blue: tuple[float, float], curve: bytes) -> bytes:
    """A screen whose primaries have these chromaticities, its white D65 adapted to D50 by Bradford."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    primaries = np.stack([xyz(*red), xyz(*green), xyz(*blue)], 1)
    white = xyz(*D65)
    columns = primaries * np.linalg.solve(primaries, white)
    cones = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    columns = np.linalg.inv(cones) @ np.diag((cones @ D50) / (cones @ white)) @ cones @ columns
    tags = {name: b"XYZ \0\0\0\0" + s15(*columns[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return assembled(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey(curve: bytes) -> bytes:
    return assembled(b"GRAY", b"XYZ ", {b"kTRC": curve})


def table(space: bytes) -> bytes:
    """A printer (b"CMYK") or scanner (b"RGB ") whose colours are paler than they should be: a table to CIELAB."""
    channels = 4 if space == b"CMYK" else 3
    entries = []
    for device in itertools.product((0.0, 1.0), repeat=channels):
        rgb = (1 - np.array(device[:3])) * (1 - device[3]) if channels == 4 else np.array(device)
        light = 0.1 + 0.7 * rgb @ np.array([0.25, 0.6, 0.15])
        entries += [light * 255, 128 + 60 * (rgb[0] - rgb[1]), 128 + 60 * (rgb[1] - rgb[2])]
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([channels, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += ramp * channels + np.clip(np.rint(entries), 0, 255).astype(np.uint8).tobytes() + ramp * 3
    return assembled(space, b"Lab ", {b"A2B0": lut})


SRGB = screen((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), srgb_curve())
DISPLAY_P3 = screen((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), srgb_curve())
ADOBE_RGB = screen((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), gamma_curve(2.19921875))
WIDE_WITH_TABLES = screen((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), table_curve(1.8))
GREY_GAMMA_1 = grey(gamma_curve(1.0))
PRESS = table(b"CMYK")
SCANNER = table(b"RGB ")
