"""What the README promises: ten minutes of reading, files that are there, and a network that loads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.servers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ["README.md", "jobs/README.md", "deploy/README.md", "tests/benchmarks/README.md"]


def test_it_is_read_in_ten_minutes() -> None:
    assert len(README.splitlines()) <= 150
    assert max(map(len, README.splitlines())) <= 130


@pytest.mark.parametrize("guide", GUIDES)
def test_what_it_names_is_there(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])(?:deploy|helm|jobs|tests|lungseg)/[a-z0-9_./-]+\.[a-z]+\b", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()


def test_its_picture_is_small() -> None:
    [picture] = re.findall(r"!\[.*\]\((.*)\)", README)
    assert (ROOT / picture).stat().st_size < 200 * 1024


def test_the_network_is_loaded_by_the_lines_given_and_not_without_our_layers(tmp_path: Path) -> None:
    from lungseg.config import ModelConfig
    from lungseg.model.unet import build_unet
    from lungseg.runs.checkpoint import arrays
    from lungseg.runs.export import export_model

    config = ModelConfig(width=2, depth=2)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.keras").write_bytes(export_model(arrays(build_unet(config).weights), config))
    [given] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    load = given.splitlines()[-1]
    alone = f"import keras\ntry: {load}\nexcept TypeError: print('TypeError')\n"
    command = [sys.executable, "-c", f"{alone}{given}print(network.input_shape)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines() == ["TypeError", "(None, None, None, None, 1)"], done.stderr
