"""A pulled network answers without lungseg as it does with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.balls import write_balls
from helpers.networks import publish_untrained

from lungseg import cli
from lungseg.runs.post import Post, record_post
from lungseg.storage import keys, open_store


@pytest.mark.slow
def test_onnx_and_saved_model_give_the_networks_own_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime
    import tensorflow as tf

    from lungseg.runs.checkpoint import Checkpoints
    from lungseg.runs.export import float32_network
    from lungseg.runs.run import load_published

    store = open_store(tmp_path / "store")
    publish_untrained(store, "r", write_balls(store))
    published = load_published(store, "r")
    post = Post("r", published.checkpoint, "", "", "cpm", {"threshold": 0.25}, 9, (), {}, {})
    record_post(store, keys.run_root("r"), post)
    words = ["pull", "--run", "r", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "out")]
    (tmp_path / "out/saved_model").mkdir(parents=True)  # as an earlier pull left it
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--onnx", "--saved-model"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    names = ("model.onnx", "saved_model", "serving.json")
    assert lines[-3:] == [str(tmp_path / "out" / name) for name in names]
    assert not list((tmp_path / "out").glob("tmp*"))

    facts = json.loads((tmp_path / "out/serving.json").read_text())
    assert facts["input"]["spacing_mm_zyx"] == [1.0, 1.0, 1.0]
    assert facts["input"]["hu_window"] == [-1000.0, 400.0]
    assert (facts["window_zyx"], facts["threshold"]) == ([32, 32, 32], 0.25)
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx")
    (given,) = session.get_inputs()
    assert given.name == facts["input"]["name"]
    served = tf.saved_model.load(str(tmp_path / "out/saved_model"))
    weights = Checkpoints(store, keys.run_root("r")).read(published.checkpoint, with_optimizer=False).weights
    network = float32_network(weights, published.recipe.model)
    random = np.random.default_rng(0)
    for shape in ((1, 16, 24, 32, 1), (2, 32, 16, 16, 1)):
        hu = random.uniform(-1100, 500, shape).astype(np.float32)
        expected = network(hu, training=False).numpy()
        assert expected.std() > 1e-3
        np.testing.assert_allclose(session.run(None, {given.name: hu})[0], expected, atol=1e-3)
        np.testing.assert_allclose(served.serve(hu).numpy(), expected, atol=1e-3)


def test_without_the_extra_it_is_named_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["pull", "--run", "r", "--store", str(tmp_path), "--out", str(tmp_path / "out"), "--onnx"])
    assert ended.value.code == 2
    assert "extra-missing (extra=onnx)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
