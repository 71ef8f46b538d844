"""The shared network: backbones, the shared head, and the model that joins them with the modalities."""
