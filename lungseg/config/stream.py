"""Settings of reading patches back."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from lungseg.config.fields import Frozen, Positive


class StreamConfig(Frozen):
    """Reading patches back: bounds on memory, disk, time and patience."""

    prefetch_mib: int = Field(256, ge=1, description="decoded patches that may wait in memory")
    threads: int = Field(16, ge=1, le=128, description="parallel ranged GETs of one worker")
    connect_seconds: Positive = Field(5.0, description="for a connection to open")
    # Stores send the first byte within a second; whatever takes ten is faster on a new connection, and all
    # GPUs wait for the slowest read.
    read_seconds: Positive = Field(10.0, description="between two pieces of an answer")
    # A server that is killed and started again is away for half a minute or more, most of which it spends
    # on electing a leader; two minutes outlive that, and cost less than a restart of all workers.
    retry_seconds: float = Field(120.0, ge=0, description="a read is tried again for, from its first failure")
    refetches: int = Field(3, ge=0, description="new tries after a checksum mismatch")
    hedge_factor: float = Field(
        3.0, ge=0, description="a read this many times slower than 95 % of them gets a second one; 0: never"
    )
    cache_dir: Path | None = Field(None, description="folder on a node's disk for fetched record batches")
    cache_gib: Positive = Field(50.0, description="the cache's bound; all workers of a node share it")
