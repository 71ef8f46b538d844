"""Frozen encoders: features of images, texts and sounds, extracted once and kept on disk."""
