"""Sources of samples, the embedded data sets and the loader that packs them."""
