"""A run directory: what is one, what is read of it, and what it is refused for."""

import json

import pytest

from support.trainings import make_run
from unet_denoiser import Run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_reads_runs_with_few_data_options(run):
    path = run.path / "config.json"
    config = json.loads(path.read_text())
    config["data"] = {name: config["data"][name] for name in ("source", "image_size", "channels", "class_names")}
    path.write_text(json.dumps(config))
    assert Run.load(run.path).data == run.data
    path.write_text(json.dumps(config | {"data": config["data"] | {"colour": 1}}))
    with pytest.raises(ValueError, match="unknown option of the data 'colour'"):
        Run.load(run.path)


def test_finds_runs_and_nothing_else(run, tmp_path):
    assert Run.find(run.path).data == run.data
    for other in (tmp_path, tmp_path / "two.npz", tmp_path / "nothing", "owner/name"):
        assert Run.find(other) is None
    (tmp_path / "config.json").write_text('{"in_channels": 3}')
    assert Run.find(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no model yet"):
        _ = run.model_folder


def test_refuses_directories(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        Run.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no model yet"):
        run.load_model()
    (run.path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="lacks data, process, training"):
        Run.load(run.path)
