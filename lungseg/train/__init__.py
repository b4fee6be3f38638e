"""Distributed training: strategy, step, checkpoints, loop and launch."""
