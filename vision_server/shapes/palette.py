"""Which colours the six colour names stand for."""

import colorsys

import numpy as np

Rgb = tuple[int, int, int]

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

# Hue in degrees, saturation, value: what a name may look like. Gaps between neighbouring names are on purpose:
# nobody can say whether a hue of 43 degrees is orange or yellow, so it is never drawn.
HSV_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-12, 8), (0.70, 1.0), (0.62, 1.0)),
    "orange": ((23, 40), (0.72, 1.0), (0.88, 1.0)),
    "yellow": ((47.5, 62), (0.60, 1.0), (0.85, 1.0)),
    "green": ((84, 152), (0.45, 1.0), (0.38, 1.0)),
    "blue": ((202, 244), (0.55, 1.0), (0.42, 1.0)),
    "purple": ((262, 302), (0.42, 1.0), (0.40, 0.92)),
}

# The colours people type when they draw a picture by hand.
ANCHORS: dict[str, tuple[Rgb, ...]] = {
    "red": ((255, 0, 0), (220, 40, 40), (220, 20, 60), (200, 0, 0), (231, 76, 60), (204, 34, 34), (178, 34, 34)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 130, 32), (230, 126, 34), (243, 156, 18), (255, 128, 0)),
    "yellow": ((255, 255, 0), (255, 215, 0), (240, 210, 40), (241, 196, 15), (255, 235, 59), (250, 220, 60)),
    "green": ((0, 128, 0), (0, 255, 0), (34, 139, 34), (50, 205, 50), (0, 160, 0), (46, 204, 113), (76, 175, 80)),
    "blue": ((0, 0, 255), (30, 60, 220), (30, 144, 255), (65, 105, 225), (0, 0, 139), (52, 152, 219), (33, 120, 243)),
    "purple": ((128, 0, 128), (160, 32, 240), (148, 0, 211), (138, 43, 226), (155, 89, 182), (142, 68, 173)),
}

ANCHOR_SHARE = 0.45
ANCHOR_JITTER = 8  # levels of 255


def hsv_to_rgb(hue_degrees: float, saturation: float, value: float) -> Rgb:
    """Hue wraps around; saturation and value are 0 to 1."""
    red, green, blue = colorsys.hsv_to_rgb((hue_degrees % 360) / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def sample_colour(rng: np.random.Generator, name: str) -> Rgb:
    """One RGB triple that the name may stand for."""
    if rng.random() < ANCHOR_SHARE:
        anchors = ANCHORS[name]
        chosen = np.array(anchors[rng.integers(len(anchors))])
        jittered = np.clip(chosen + rng.integers(-ANCHOR_JITTER, ANCHOR_JITTER + 1, 3), 0, 255)
        return int(jittered[0]), int(jittered[1]), int(jittered[2])
    hue, saturation, value = HSV_RANGES[name]
    return hsv_to_rgb(rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value))
