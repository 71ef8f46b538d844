"""The shared network: backbones, the head, and the model that joins them with the modalities."""
