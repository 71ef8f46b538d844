"""Measurements: baselines, benches per level, committed rows and their plots."""
