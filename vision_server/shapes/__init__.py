"""Drawn shapes: the scenes, the questions and the two small models this platform ships."""
