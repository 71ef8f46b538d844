"""From the bytes of a sample to the rows of a pack."""
