"""The folders that the page may read and write: those that the command line names."""

import re
from dataclasses import dataclass
from pathlib import Path

from unet_denoiser.config.paths import is_hub_name, local_path
from unet_denoiser.utils.files import read_json

CONFIG_NAME, PIPELINE_NAME, PROCESS_NAME = "config.json", "model_index.json", ".process.json"
DATA_SUFFIXES = (".npz", ".npy", ".parquet")
MAX_NAME = 64  # letters of a new run's name


@dataclass(frozen=True)
class Sources:
    """Runs and pipelines to choose from, and data to train on.

    Args:
        places: runs, models and pipelines (folders, files or hub names), and folders of them.
        data: a folder of data: itself, its sub-folders, and its .npz, .npy and .parquet files.
    """

    places: tuple[str, ...]
    data: Path | None = None

    @classmethod
    def from_arguments(cls, places: tuple[str, ...], data: Path | None = None) -> "Sources":
        """Check the arguments of the command; ValueError or FileNotFoundError for one that names nothing."""
        for place in places:
            is_missing = not is_hub_name(place) and not local_path(place).exists()
            if is_missing and place != "runs":
                advice = "give a run, a folder of runs, or a published pipeline's folder or hub name (owner/name)"
                raise FileNotFoundError(f"{place} does not exist; {advice}")
        if data is not None and not data.is_dir():
            raise FileNotFoundError(f"data={data} is no folder; give one that holds data to train on")
        return cls(places, data)

    def networks(self) -> list[str]:
        """List runs, models and pipelines, as the page names them."""
        found: list[str] = []
        for place in self.places:
            path = local_path(place)
            if not path.exists():
                found += [place] if is_hub_name(place) and place != self._home_name() else []
            elif path.is_file() or _is_network(path):
                found.append(place)
            else:
                found += [str(Path(place) / child.name) for child in sorted(path.iterdir()) if _is_network(child)]
        return list(dict.fromkeys(found))

    def runs(self) -> list[str]:
        """List the runs: directories that `train` wrote or is about to write."""
        return [name for name in self._folders() if _is_run(local_path(name))]

    def find_network(self, name: str | None) -> str:
        """Return what `load_pipeline` takes for a name of `networks`; ValueError for another one."""
        return self._find("network", name, self.networks())

    def find_run(self, name: str | None) -> Path:
        """Return the directory of a run; ValueError for a name that is not one of `runs`."""
        return local_path(self._find("run", name, self.runs()))

    @property
    def home(self) -> Path | None:
        """The folder that new runs go to: the first that is a folder of runs; None if there is none."""
        name = self._home_name()
        return None if name is None else local_path(name)

    def new_run(self, name: str) -> Path:
        """Return the directory of a new run; ValueError for a name that is taken, or is more than a name."""
        home = self.home
        if home is None:
            raise ValueError("a new run needs a folder of runs; start the page with one, as in: unet-denoiser app runs")
        if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}", name):
            valid = f"letters, digits, '.', '_' and '-', at most {MAX_NAME}, such as 'digits-2'"
            raise ValueError(f"name={name!r} must be {valid}")
        if (home / name).exists():
            raise ValueError(f"name={name!r} is taken: {home / name} exists; give another one")
        return home / name

    def datasets(self) -> list[str]:
        """List the data that can be trained on, as the page names them."""
        if self.data is None:
            return ["digits"]
        children = sorted(child for child in self.data.iterdir() if not child.name.startswith("."))
        usable = [child for child in children if child.is_dir() or child.suffix.lower() in DATA_SUFFIXES]
        return ["digits", *map(str, (self.data, *usable))]

    def find_dataset(self, name: str | None) -> str:
        """Return the data's source; ValueError for a name that is not one of `datasets`."""
        return self._find("data", name, self.datasets())

    def _find(self, field: str, name: str | None, names: list[str]) -> str:
        if name not in names:
            valid = f"choose one of {', '.join(names)}" if names else "there is none yet; start a training first"
            raise ValueError(f"{field}={name!r} is not there; {valid}" if name else f"no {field} is chosen; {valid}")
        return name

    def _folders(self) -> list[str]:
        found: list[str] = []
        for place in self.places:
            path = local_path(place)
            if path.is_dir() and _is_run(path):
                found.append(place)
            elif path.is_dir() and not _is_network(path):
                found += [str(Path(place) / child.name) for child in sorted(path.iterdir()) if child.is_dir()]
        return list(dict.fromkeys(found))

    def _home_name(self) -> str | None:
        for place in self.places:
            path = local_path(place)
            if (path.is_dir() and not _is_network(path) and not _is_run(path)) or (
                place == "runs" and not path.exists()
            ):
                return place
        return None


def _is_run(path: Path) -> bool:
    """Return True for a directory of a training, also of one that has not written its config.json yet."""
    if (path / PROCESS_NAME).is_file() or (path / "train.log").is_file():
        return True
    return _has_training(path / CONFIG_NAME)


def _has_training(config: Path) -> bool:
    try:
        return config.is_file() and "training" in read_json(config)
    except (OSError, ValueError):
        return False


def _is_network(path: Path) -> bool:
    """Return True for a run with weights, a saved model or a pipeline."""
    if not path.is_dir():
        return False
    if (path / PIPELINE_NAME).is_file() or (path / "model" / CONFIG_NAME).is_file():
        return True
    return (path / CONFIG_NAME).is_file() and not _has_training(path / CONFIG_NAME)
