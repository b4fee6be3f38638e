"""What is kept of each scan gives the very figures again."""

from __future__ import annotations

import json

import numpy as np

from lungseg.evaluate.bootstrap import ratio, resample
from lungseg.evaluate.froc import MISSED, Hits, froc
from lungseg.evaluate.records import cpm, from_record, to_record


def test_figures_survive_json_to_the_last_bit() -> None:
    random = np.random.default_rng(0)
    scans = [Hits(np.array([random.random(), MISSED]), random.random(3)) for _ in range(6)]
    scans.append(Hits(np.empty(0), np.empty(0)))
    dice = ratio(random.random(7), np.ones(7))
    again = from_record(json.loads(json.dumps(to_record({"dice": dice}, {"luna16": scans}), allow_nan=False)))
    weights = resample(range(7), 50)
    assert list(again) == ["dice", "cpm_luna16"]
    np.testing.assert_array_equal(again["dice"](weights), dice(weights))
    np.testing.assert_array_equal(again["cpm_luna16"](weights), cpm(scans)(weights))
    assert again["cpm_luna16"](np.ones((1, 7), int)) == froc(scans).cpm
