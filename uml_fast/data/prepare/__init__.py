"""Files of one modality become shards: listing, conversion in parallel, writing, statistics."""
