"""Packs of fixed size: their parts, their layout and the order of samples in them."""
