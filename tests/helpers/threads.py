"""How many threads the numerical libraries of a process use."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_info


def threads_of_numpy() -> list[int]:
    """After its libraries have worked."""
    np.ones((8, 8)) @ np.ones((8, 8))
    return [int(one["num_threads"]) for one in threadpool_info()]
