"""Two hundred mutated series; fuzz_dicom.py runs 10,000 (`python tests/scan/fuzz_dicom.py`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_a_mutated_series_is_refused_or_read_as_its_files_say():
    spec = importlib.util.spec_from_file_location("fuzz_dicom", Path(__file__).with_name("fuzz_dicom.py"))
    fuzz_dicom = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_dicom)
    counts, wrong = fuzz_dicom.fuzz(200, seed=0)
    assert wrong == []
    assert counts["volume"] >= 20
    assert len(counts) >= 8  # the mutations reach many of the checks
