"""Who may write to a run: the holder of its newest claim.

Each start of a group of workers claims the next number, which `put_if_absent` gives to exactly one. Whoever
writes looks first whether a newer claim is there. Between that look and the write a newer holder may begin;
so checkpoints carry the number of their claim, and the newest one is looked for among the newest claims
first: what a late writer still commits is never taken for the newer holder's.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lungseg.errors import RunError
from lungseg.storage import Store, keys, to_json


@dataclass(frozen=True)
class Lease:
    """The right to write below `root`, until somebody claims `number` + 1."""

    store: Store
    root: str
    number: int

    def check(self) -> None:
        """Raises RunError("run-taken-over") once somebody else continues the run."""
        if self.store.exists(keys.claim(self.root, self.number + 1)):
            raise _taken_over(self.root)


def claim(store: Store, root: str, driver: str) -> Lease:
    """The newest claim on `root`, made for the command that calls itself `driver`.

    A command that is new to the run takes it over; one that restarts its workers may not take it back.
    Raises RunError("run-taken-over").
    """
    while True:
        claims = [item.key for item in store.find(keys.claims(root))]
        drivers = [store.get_json(key)["driver"] for key in claims]
        if driver in drivers and drivers[-1] != driver:
            raise _taken_over(root)
        lease = Lease(store, root, len(claims) + 1)
        mine = to_json({"driver": driver, "token": secrets.token_hex(8)})
        if store.put_if_absent(keys.claim(root, lease.number), mine):
            return lease


def _taken_over(root: str) -> RunError:
    remedy = "leave it to the other command, or stop that one and --resume"
    return RunError("run-taken-over", run=root, message="another command continues this run", remedy=remedy)
