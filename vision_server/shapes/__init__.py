"""Drawn shapes: the scenes, the questions and the small models this platform ships."""
