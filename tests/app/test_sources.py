"""What the command line names is all that the page reads and writes."""

import json
from pathlib import Path

import pytest

from unet_denoiser.app.sources import Sources
from unet_denoiser.config.training import TrainingConfig


def make_run(path, *, trained=True):
    (path / "model").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"training": {"steps": TrainingConfig().steps}}))
    if trained:
        (path / "model" / "config.json").write_text("{}")


@pytest.fixture
def here(here):
    make_run(here / "runs" / "a")
    make_run(here / "runs" / "b", trained=False)
    make_run(here / "elsewhere" / "c")
    (here / "runs" / "notes").mkdir()
    (here / "pipeline").mkdir()
    (here / "pipeline" / "model_index.json").write_text("{}")
    return here


def test_runs_and_pipelines_are_found(here):
    sources = Sources.from_arguments(("runs", "pipeline", "elsewhere/c", "owner/name"))
    assert sources.networks() == ["runs/a", "pipeline", "elsewhere/c", "owner/name"]
    assert sources.runs() == ["runs/a", "runs/b", "elsewhere/c"]
    assert sources.find_run("runs/b") == Path("runs/b")
    assert sources.home == Path("runs")


@pytest.mark.parametrize("name", ["elsewhere/c", "runs/../elsewhere/c", "/etc", "runs/notes", "", None])
def test_what_the_command_line_does_not_name_is_not_there(here, name):
    sources = Sources.from_arguments(("runs",))
    for find in (sources.find_run, sources.find_network):
        with pytest.raises(ValueError, match="choose one of runs/a"):
            find(name)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", ".hidden", "a" * 65, "x\n", "-x"])
def test_the_name_of_a_new_run_is_no_path(here, name):
    with pytest.raises(ValueError, match="must be letters"):
        Sources.from_arguments(("runs",)).new_run(name)


def test_new_runs_go_to_the_folder_of_runs(here):
    assert Sources.from_arguments(("elsewhere/c", "runs")).new_run("d-1.x") == Path("runs/d-1.x")
    with pytest.raises(ValueError, match="is taken"):
        Sources.from_arguments(("runs",)).new_run("a")
    with pytest.raises(ValueError, match="needs a folder of runs"):
        Sources.from_arguments(("runs/a",)).new_run("d")


def test_the_default_folder_need_not_exist_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = Sources.from_arguments(("runs",))
    assert (sources.networks(), sources.runs()) == ([], [])
    assert sources.new_run("first") == Path("runs/first")
    with pytest.raises(ValueError, match="no run is chosen; there is none yet; start a training first"):
        sources.find_run(None)


def test_data_are_digits_and_what_the_folder_of_data_has(here):
    (here / "data" / "photos").mkdir(parents=True)
    for name in ("x.npz", "notes.txt", ".hidden.npz"):
        (here / "data" / name).touch()
    sources = Sources.from_arguments(("runs",), Path("data"))
    assert sources.datasets() == ["digits", "data", "data/photos", "data/x.npz"]
    assert Sources.from_arguments(("runs",)).datasets() == ["digits"]
    with pytest.raises(ValueError, match="choose one of digits, data"):
        sources.find_dataset("/etc")


@pytest.mark.parametrize(("places", "data", "message"), [
    (("missing",), None, "missing does not exist; give a run"),
    (("runs",), "missing", "data=missing is no folder"),
])  # fmt: skip
def test_missing_folders_are_refused(here, places, data, message):
    with pytest.raises(FileNotFoundError, match=message):
        Sources.from_arguments(places, data and Path(data))
