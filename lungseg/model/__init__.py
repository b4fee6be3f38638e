"""Networks, losses and in-graph augmentation."""
