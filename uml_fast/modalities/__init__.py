"""The modalities: for each, what a raw row means to the model (stem, target, decoder) and to a person."""
