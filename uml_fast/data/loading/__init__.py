"""Packs, filled ahead of the step."""
