"""The verbs that show whether all works: demo, doctor."""

from __future__ import annotations

from pathlib import Path

from lungseg.cli.app import app
from lungseg.cli.ends import end
from lungseg.cli.options import STORE, Address, OptionalStoreUri, Out, StoreUri
from lungseg.show import table


@app.command()
def demo(out: Out = Path("lungseg-demo"), store: StoreUri = STORE) -> None:
    """Go the whole way on synthetic scans. DICOM, patches, training, evaluation, a segmented scan."""
    from lungseg.demo import run_demo

    run_demo(out, store)


@app.command()
def doctor(store: OptionalStoreUri = None, address: Address = None) -> None:
    """Check this machine, a store and a cluster for what lungseg needs. No secret is shown."""
    from lungseg.doctor import examine

    findings = examine(store, address)
    print(table(("check", "", "found"), [(f.check, "ok" if f.ok else "FAIL", f.found) for f in findings]))
    failed = [f for f in findings if not f.ok]
    if failed:
        end("; ".join(f"{f.check}: {f.remedy}" for f in failed), 2)
