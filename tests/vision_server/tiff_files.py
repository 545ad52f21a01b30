"""Uncompressed TIFF files of kinds that no library here writes."""

from __future__ import annotations

import struct

import numpy as np

SHORT, LONG = 3, 4


def tiff(
    pixels: np.ndarray, *, order: str = "<", bits: int = 16, photometric: int = 1, sample_format: int = 1
) -> bytes:
    """`pixels` is height × width or height × width × samples; 12 bits are packed, other numbers are `bits` wide.

    `photometric`: 0 white is zero, 1 black is zero, 2 RGB, 5 CMYK. `sample_format`: 1 unsigned, 2 signed, 3 floating point.
    """
    height, width = pixels.shape[:2]
    samples = pixels.shape[2] if pixels.ndim == 3 else 1
    if bits == 12:  # width is even
        high, low = pixels[:, 0::2].astype(int), pixels[:, 1::2].astype(int)
        data = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], -1).astype(np.uint8).tobytes()
    else:
        kind = "f" if sample_format == 3 else "i" if sample_format == 2 else "u"
        data = pixels.astype(f"{order}{kind}{bits // 8}").tobytes()
    entries = [
        (256, LONG, [width]),
        (257, LONG, [height]),
        (258, SHORT, [bits] * samples),
        (259, SHORT, [1]),
        (262, SHORT, [photometric]),
        (273, LONG, [0]),  # where the pixels begin: known when the rest is
        (277, SHORT, [samples]),
        (278, LONG, [height]),
        (279, LONG, [len(data)]),
        (339, SHORT, [sample_format] * samples),
    ]
    more_at = 8 + 2 + 12 * len(entries) + 4
    more = b""
    table = struct.pack(order + "H", len(entries))
    long_values = {tag: values for tag, _, values in entries if len(values) > 2}
    pixels_at = more_at + sum(2 * len(values) for values in long_values.values())
    for tag, kind_code, values in entries:
        values = [pixels_at] if tag == 273 else values
        packed = struct.pack(f"{order}{len(values)}{'H' if kind_code == SHORT else 'I'}", *values)
        if len(packed) > 4:
            packed, more = struct.pack(order + "I", more_at + len(more)), more + packed
        table += struct.pack(order + "HHI", tag, kind_code, len(values)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return head + table + bytes(4) + more + data
