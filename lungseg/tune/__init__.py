"""Hyper-parameter search over `train`."""
