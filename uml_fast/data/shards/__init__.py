"""Shards: tar files with an index, here or elsewhere, and the samples in them."""
