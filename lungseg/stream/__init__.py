"""A data set becomes batches: ordered, fetched, cached and decoded ahead of the step that needs them."""
