"""Labelled scans become a data set in the store: patches in shards, held-out scans, a manifest, a card."""
