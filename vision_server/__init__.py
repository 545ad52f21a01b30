"""The vision server: images in, detections and words out."""

__version__ = "0.1.0"
