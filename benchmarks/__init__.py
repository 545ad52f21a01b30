"""Measures of the platform against the bare loop, in one run, as ratios."""
