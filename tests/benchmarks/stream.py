"""lungseg's stream against the field's loaders, all in one run on one machine.

    uv run python tests/benchmarks/stream.py --peer-python /path/to/peers/bin/python [--repeats 5]

One SeaweedFS and one folder hold the same patches in every format. From S3 each contender reads one pass,
from a folder or a filled cache `--passes`, in a process of its own whose imports are not timed; the
contenders take turns, so that a slow spell of the machine meets them all. Without --peer-python only what
lungseg's own environment has is run. It prints one table of medians and ranges, and how lungseg stands to
the bars.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from helpers.servers import BUCKET, REAL_DATA, S3Server, s3_client  # noqa: E402

CODECS = ("raw", "lz4", "zstd", "planes-lz4", "planes-zstd")
SIDE = 64
PATCH_BYTES = 3 * SIDE**3


@dataclass(frozen=True)
class Contender:
    """`place` is where it reads from: "s3", "s3 cached" or "folder"."""

    name: str
    place: str

    @property
    def ours(self) -> bool:
        return self.name.startswith(("lungseg", "raw"))


def contenders(with_peers: bool) -> list[Contender]:
    both = ("s3", "folder")
    ours = [Contender("raw GETs", "s3")]
    ours += [Contender(f"lungseg {c}", place) for c in CODECS for place in ("s3", "s3 cached", "folder")]
    in_our_environment = [Contender("tfrecord", "folder"), *(Contender("raydata", place) for place in both)]
    mosaic = [Contender(name, p) for name in ("mosaic", "mosaic-zstd") for p in ("s3", "s3 cached", "folder")]
    others = [*mosaic, *(Contender("webdataset", place) for place in both)]
    return ours + in_our_environment + (others if with_peers else [])


class Bench:
    """The formats below `work`, and how to run a contender on them."""

    def __init__(self, work: Path, peer_python: str | None, stored: int, passes: int) -> None:
        self.work, self.stored, self.passes = work, stored, passes
        self.pythons = {"mosaic": peer_python, "mosaic-zstd": peer_python, "webdataset": peer_python}

    def _run(self, contender: Contender, script: str, *arguments: str) -> str:
        python = self.pythons.get(contender.name) or sys.executable
        command = [python, str(HERE / script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{contender}: {' '.join(command)}\n{done.stderr[-3000:]}")
        return done.stdout

    def _target(self, contender: Contender) -> str:
        kind = "lungseg" if contender.ours else contender.name
        return str(self.work / kind) if contender.place == "folder" else f"s3://{BUCKET}/{kind}"

    def write(self, contender: Contender) -> None:
        source = ("--source", str(self.work / "source"))
        if contender.ours:
            codec = contender.name.removeprefix("lungseg ")
            self._run(contender, "ours.py", "write", codec, *source, "--store", self._target(contender))
        else:
            self._run(
                contender, "peers.py", "write", contender.name, *source, "--out", self._target(contender)
            )

    def read(self, contender: Contender, passes: int | None = None) -> dict[str, Any]:
        """One run; a cold one on an empty cache, a cached one on the cache that an earlier run filled."""
        passes = passes or (1 if contender.place == "s3" else self.passes)
        count = ("--patches", str(passes * self.stored), "--batch", "8")
        cache = self.work / "cache" / contender.name.replace(" ", "-")
        caching = "cached" in contender.place or (
            contender.name.startswith("mosaic") and contender.place == "s3"
        )
        flags = ("--cache", str(cache)) if caching else ()
        if contender.place == "s3":
            shutil.rmtree(cache, ignore_errors=True)
        if contender.ours:
            verb, codec = (
                ("raw-gets", "raw") if contender.name == "raw GETs" else ("read", contender.name[8:])
            )
            place = ("--store", self._target(contender))
            if "cached" in contender.place and not cache.exists():
                self._run(contender, "ours.py", verb, codec, *place, *count, *flags)
            out = self._run(contender, "ours.py", verb, codec, *place, *count, *flags)
        else:
            place = ("--source", self._target(contender))
            out = self._run(contender, "peers.py", "read", contender.name, *place, *count, *flags)
        return dict(json.loads(out.splitlines()[-1]))


def write_source(folder: Path, patches: int) -> None:
    """`patches` cubes of a real chest CT at 1 mm (or of a synthetic one where that is not at hand), every
    third with a ball as mask."""
    from lungseg.scan.dicom import read_series
    from lungseg.scan.resample import resample
    from lungseg.sources.phantom.write import write_phantom

    real = REAL_DATA / "ct_c3n00247"
    series = real if real.is_dir() else write_phantom(folder / "phantom", 1, 0)[0]
    print(f"patches of {'a real CT' if real.is_dir() else 'a synthetic CT'}", file=sys.stderr)
    hu = resample(read_series(series), (1.0, 1.0, 1.0)).volume_hu
    rng = np.random.default_rng(0)
    corners = zip(*(rng.integers(0, side - SIDE + 1, patches) for side in hu.shape), strict=True)
    image = np.stack([hu[z : z + SIDE, y : y + SIDE, x : x + SIDE] for z, y, x in corners])
    mask = np.zeros(image.shape, np.uint8)
    grid = np.indices((SIDE,) * 3)
    for number in range(0, patches, 3):
        centre = rng.uniform(20, 44, 3).reshape(3, 1, 1, 1)
        mask[number] = ((grid - centre) ** 2).sum(axis=0) < rng.uniform(2, 12) ** 2
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", image)
    np.save(folder / "mask.npy", mask)


@contextmanager
def server(folder: Path) -> Iterator[None]:
    folder.mkdir()
    one = S3Server(folder)
    os.environ.update(one.environment)
    one.start()
    try:
        s3_client().create_bucket(Bucket=BUCKET)
        yield
    finally:
        one.stop()


def table(results: dict[Contender, list[dict[str, Any]]]) -> str:
    """Markdown: median (lowest to highest)."""

    def column(runs: list[dict[str, Any]], value: Any, form: str) -> str:
        found = sorted(value(run) for run in runs)
        return f"{statistics.median(found):{form}} ({found[0]:{form}} to {found[-1]:{form}})"

    lines = ["| loader | from | patches/s | MB/s | CPU s/GB | peak MiB |", "|---|---|--:|--:|--:|--:|"]
    for contender, runs in results.items():
        speed = column(runs, lambda r: r["patches"] / r["seconds"], ".0f")
        megabytes = statistics.median(r["patches"] * PATCH_BYTES / r["seconds"] / 1e6 for r in runs)
        cpu = column(runs, lambda r: r["cpu_seconds"] / (r["patches"] * PATCH_BYTES / 1e9), ".2f")
        peak = statistics.median(r["peak_mib"] for r in runs)
        lines.append(
            f"| {contender.name} | {contender.place} | {speed} | {megabytes:.0f} | {cpu} | {peak:.0f} |"
        )
    return "\n".join(lines)


def bars(results: dict[Contender, list[dict[str, Any]]], default: str) -> str:
    """How the default codec stands to the best peer of each place, and raw to the raw GETs."""

    def median(contender: Contender, value: Any) -> float:
        return statistics.median(value(run) for run in results[contender])

    def speed(run: dict[str, Any]) -> float:
        return float(run["patches"] / run["seconds"])

    lines = []
    for place in ("s3", "s3 cached", "folder"):
        peers = [c for c in results if not c.ours and c.place == place]
        if not peers:
            continue
        mine = Contender(f"lungseg {default}", place)
        best = max(peers, key=lambda c: median(c, speed))
        frugal = min(peers, key=lambda c: median(c, lambda r: r["cpu_seconds"] / r["patches"]))
        ratio = median(mine, speed) / median(best, speed)
        cpu = median(mine, lambda r: r["cpu_seconds"] / r["patches"])
        cpu /= median(frugal, lambda r: r["cpu_seconds"] / r["patches"])
        lines.append(f"{place}: {default} is {ratio:.2f}x the fastest peer ({best.name}) in patches/s, ")
        lines[-1] += f"and takes {cpu:.2f}x the CPU of the most frugal one ({frugal.name})"
    share = median(Contender("lungseg raw", "s3"), speed) / median(Contender("raw GETs", "s3"), speed)
    lines.append(f"raw codec: {share:.0%} of the raw GETs' ceiling")
    return "\n".join(lines)


def check_complete(results: dict[Contender, list[dict[str, Any]]]) -> None:
    """Every loader delivered every patch: the fingerprints of as many passes are equal."""
    prints: dict[int, set[int]] = {}
    for contender, runs in results.items():
        if contender.name != "raw GETs":
            for run in runs:
                prints.setdefault(run["patches"], set()).add(run["fingerprint"])
    if any(len(found) > 1 for found in prints.values()):
        raise SystemExit(f"loaders delivered different patches: {prints}")


def main() -> None:
    from lungseg.config import ShardConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--peer-python")
    parser.add_argument("--stored", type=int, default=960, help="patches in the data set")
    parser.add_argument("--passes", type=int, default=4, help="of a run that reads no S3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of loaders, as in the table")
    parser.add_argument("--place", help="only from here, as in the table")
    parser.add_argument("--json", type=Path, help="write every run's figures")
    options = parser.parse_args()
    chosen = [
        contender
        for contender in contenders(bool(options.peer_python))
        if not options.only or contender.name in options.only
        if not options.place or contender.place == options.place
    ]
    with tempfile.TemporaryDirectory() as scratch, server(Path(scratch) / "seaweedfs"):
        work = Path(scratch)
        write_source(work / "source", options.stored)
        bench = Bench(work, options.peer_python, options.stored, options.passes)
        for contender in chosen:
            if "cached" not in contender.place and contender.name != "raw GETs":
                bench.write(contender)
        results: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in chosen}
        for repeat in range(options.repeats):
            for contender in chosen:
                results[contender].append(bench.read(contender))
            print(f"round {repeat + 1} of {options.repeats} is done", file=sys.stderr)
        check_complete(results)
        print(table(results))
        if not options.only and not options.place:
            print(bars(results, ShardConfig().codec))
            mine = Contender(f"lungseg {ShardConfig().codec}", "s3")
            once = statistics.median(run["peak_mib"] for run in results[mine])
            peak = bench.read(mine, 10)["peak_mib"]
            print(f"peak memory of one pass {once:.0f} MiB, of ten passes {peak:.0f} MiB")
    if options.json:
        runs = {f"{c.name}, {c.place}": found for c, found in results.items()}
        options.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
