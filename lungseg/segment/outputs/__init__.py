"""What `predict` writes of a segmented scan."""
