"""The modalities: what a raw row means to the model (stem, target, decoder) and to a person."""
