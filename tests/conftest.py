"""One real S3 server and one local Ray for the whole session."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import BUCKET, REAL_DATA, S3Server, s3_client


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running server with an empty bucket; its credentials are in the environment of this process,
    and so of every Ray worker and command that is started after it."""
    server = S3Server(tmp_path_factory.mktemp("seaweedfs"))
    before = {name: os.environ.get(name) for name in server.environment}
    os.environ.update(server.environment)
    server.start()
    try:
        s3_client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def s3_uri(s3_server: S3Server) -> str:
    """An empty prefix of the bucket, one a test."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[Any]:
    """The local Ray that lungseg itself starts; it starts after the S3 server to know its address."""
    from lungseg.cluster import connect

    ray = connect()
    yield ray
    ray.shutdown()


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"real CT is not at {REAL_DATA}: fetch the CT samples that its README lists")
    return REAL_DATA


@pytest.fixture(scope="session")
def write_balls() -> Callable[[Store, str], Manifest]:
    """Writes a data set of 16-voxel patches, each a ball of tissue in noisy lung, straight as shards:
    24 to train on and 6 to validate, every third of them without a ball, ignore voxels in the corners."""

    def write(store: Store, name: str) -> Manifest:
        shape = (16, 16, 16)
        written = {}
        for split, count in (("train", 24), ("val", 6)):
            patches = [_ball(f"{split}-{i}", i, shape, bool(i % 3)) for i in range(count)]
            groups = [patches[i : i + 3] for i in range(0, count, 3)]
            key = f"data/{name}/shards/{split}-00000.arrow"
            written[split] = (write_shard(store, key, groups, shape, "lz4"),)
        manifest = Manifest(name, "balls", {}, shape, written, {}, {}, {}, ())
        store.put(manifest_key(name), manifest.to_bytes())
        return load_manifest(store, name)

    return write


def _ball(case_id: str, number: int, shape: tuple[int, int, int], positive: bool) -> Patch:
    random = np.random.default_rng(number)
    image = random.normal(-800, 40, shape)
    mask = np.zeros(shape, np.uint8)
    if positive:
        centre, radius = random.uniform(5, 11, 3), random.uniform(2.5, 5)
        distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
        mask[distance <= radius] = 1
        image[mask == 1] += 800
    mask[-2:, -2:, -2:] = IGNORE
    stratum = "nodule" if positive else "lung"
    return Patch(image.astype(np.int16), mask, case_id, "", stratum, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
