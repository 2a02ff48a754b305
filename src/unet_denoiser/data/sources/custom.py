"""Custom datasets, given from Python: any map-style or iterable dataset of dicts."""

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unet_denoiser.data.columns import encode_labels, warn_empty_classes
from unet_denoiser.data.dataset import ImageDataset, StreamDataset, StreamIndex
from unet_denoiser.data.transforms import GREY_MODES, to_float, to_pixels

# other keys that items of torchvision and datasets have
KEYS = {"images": "image", "img": "image", "pixel_values": "image", "label": "class_labels", "labels": "class_labels"}


class CustomDataset(ImageDataset):
    """A map-style dataset of {"image": (C, *spatial), conditions}; its first item sets channels and size.

    `check_item` says in which other forms an item may come.

    The global generators of torch, numpy and random are seeded by each item's position, so that the dataset's own
    random augmentation is repeated exactly when a run is resumed.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        if not len(data):
            raise ValueError("the dataset has no items")
        try:
            first = data[0]
        except (KeyError, TypeError) as error:
            found = f"data is a {type(data).__name__}, of which data[0] gives no item ({type(error).__name__}: {error})"
            raise TypeError(f"{found}; give a dataset of dicts, or a list of them") from None
        self.shape = _describe(self, first, "item 0")

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with _seed_generators(index) if isinstance(index, StreamIndex) else nullcontext():
            return check_item(self.data[int(index)], f"item {int(index)}", self.shape, self.class_names)


class CustomStream(StreamDataset):
    """An iterable dataset of dicts as for `CustomDataset`, iterated over again for each epoch.

    If it has a method `set_epoch`, that gets the epoch's number. To resume a run exactly, an epoch's order must be the
    same each time.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        first = next(iter(data), None)
        if first is None:
            raise ValueError("the dataset has no items")
        self.shape = _describe(self, first, "the first item")

    def read_epoch(self, epoch: int, seed: int) -> Iterator[Any]:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)
        return iter(self.data)

    def decode(self, raw: Any, index: StreamIndex) -> dict[str, Any]:
        return check_item(raw, f"the item at position {index.position}", self.shape, self.class_names)


def as_dataset(data: Any) -> ImageDataset | StreamDataset:
    """Adapt any dataset for `make_loader`: a Hugging Face or custom one is wrapped, others are returned as they are.

    Raises:
        TypeError: `data` is not a dataset.
        ValueError: items that have no image.
    """
    if isinstance(data, ImageDataset | StreamDataset):
        return data
    kind = type(data).__name__
    if isinstance(data, DataLoader):
        raise TypeError(f"data is a {kind}; give its dataset, loader.dataset: training makes its own batches")
    if type(data).__module__.split(".")[0] == "datasets":  # told by name, to import `datasets` only if it is used
        return _adapt_hub(data)
    if isinstance(data, str | bytes | Mapping):
        raise TypeError(f"data is a {kind}; give a dataset of dicts, or load_data(path)")
    if isinstance(data, IterableDataset) or (hasattr(data, "__iter__") and not hasattr(data, "__getitem__")):
        if not isinstance(data, IterableDataset) and hasattr(data, "__next__"):
            raise TypeError(f"data is a {kind}, which can be read only once; give a list, or a dataset")
        return CustomStream(data)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise TypeError(f"data is a {kind}; give a dataset of dicts with len() and [], or an iterable")
    return CustomDataset(data)


def _adapt_hub(data: Any) -> ImageDataset | StreamDataset:
    """Adapt an object of `datasets`: a table, a stream, or items that a transform or function of the user makes."""
    import datasets

    from unet_denoiser.data.sources.huggingface import HubDataset, HubStream, resolve_features

    if isinstance(data, datasets.Dataset):
        if data.format["type"] == "custom":
            return CustomDataset(data)
        table = HubDataset(data)
        if table.labels is not None:
            warn_empty_classes(table.labels, table.class_names or [], table.config.source)
        return table
    if isinstance(data, datasets.IterableDataset):
        stream = resolve_features(data)
        return CustomStream(data) if stream is None else HubStream(stream)
    splits = f"; it has {', '.join(data)}" if isinstance(data, dict) else ""
    raise TypeError(f"data is a {type(data).__name__}; give one split of it, for example data['train']{splits}")


def _describe(described: CustomDataset | CustomStream, first: Any, name: str) -> tuple[int, ...]:
    """Set a dataset's attributes from its first item, and return the shape of the image."""
    data = described.data
    # torchvision's datasets call them `classes`
    names = getattr(data, "class_names", None) or getattr(data, "classes", None)
    features = getattr(data, "features", None) or {}  # of `datasets`
    for key in ("class_labels", *KEYS):
        if names is None and KEYS.get(key, key) == "class_labels" and key in features:
            names = getattr(features[key], "names", None)
    described.class_names = None if names is None else [str(name) for name in names]
    item = check_item(first, name, None, described.class_names)
    image = item["image"]
    shape = tuple(image.shape)
    described.channels, described.image_size = shape[0], shape[1:]
    described.vector_dim = len(item["vector"]) if "vector" in item else None
    described.context_dim = item["context"].shape[-1] if "context" in item else None
    described.concat_channels = len(item["concat"]) if "concat" in item else 0
    described.origins = {key: "the items" for key in ("class_labels", "caption", "vector") if key in item}
    if 0 <= (low := image.min()) < (high := image.max()):
        found = f"'image' in {name} goes from {low:.3g} to {high:.3g}, and black is -1"
        warnings.warn(f"{found}; give 2 * x - 1 of images in [0, 1], as ToTensor makes them", stacklevel=4)
    return shape


def check_item(
    item: Any, name: str, shape: tuple[int, ...] | None = None, class_names: list[str] | None = None
) -> dict[str, Any]:
    """Return an item with arrays as tensors, its image as float32 (C, *spatial), and its label as an integer.

    Args:
        item: a dict; or an image, or an (image, label), as of torchvision. An image is floats (C, *spatial), which are
            not scaled, a PIL image, or uint8 from 0 to 255, (C, H, W) or as an array (H, W[, C]).
        shape: of the first item's image; a PIL image is converted to as many channels.
        class_names: by which a label may be given.

    Raises:
        ValueError: an item of another kind, or of another shape.
    """
    if isinstance(item, Tensor | np.ndarray | Image.Image):
        item = {"image": item}
    elif isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor | np.ndarray | Image.Image):
        item = {"image": item[0], "class_labels": item[1]}
    if isinstance(item, Mapping):
        item = {key if KEYS.get(key, key) in item else KEYS.get(key, key): value for key, value in item.items()}
    if not isinstance(item, Mapping) or "image" not in item:
        is_dict = isinstance(item, Mapping)
        found = f"has the keys {', '.join(map(str, item))}" if is_dict else f"is a {type(item).__name__}"
        raise ValueError(f"{name} of the dataset {found}; give dicts with 'image', for example {{'image': tensor}}")
    image = _to_tensor(item["image"], shape[0] if shape else None)
    item = {key: _from_numpy(value) for key, value in item.items()}
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim < 2:
        found = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"'image' in {name} is {found}; give a tensor (C, *spatial) of floats, in [-1, 1]")
    if shape is not None and tuple(image.shape) != shape:
        raise ValueError(f"'image' in {name} has shape {tuple(image.shape)}, but the first one has {shape}")
    if "class_labels" in item:
        item["class_labels"] = _to_label(item["class_labels"], name, class_names)
    return item | {"image": image.float()}


def _to_tensor(image: Any, channels: int | None) -> Any:
    """Return an image as floats (C, *spatial) in [-1, 1] if its meaning is plain, else as it is."""
    if isinstance(image, Image.Image):
        channels = channels or (1 if image.mode in GREY_MODES else 3)
        return to_float(to_pixels(image, channels, (image.height, image.width), "stretch"))
    if isinstance(image, np.ndarray):
        is_hwc = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3, 4)
        image = _from_numpy(np.moveaxis(image, 2, 0) if is_hwc else image)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim in (2, 3):
        image = image[None] if image.ndim == 2 else image
        return to_float(image) if image.shape[0] in (1, 3, 4) else image
    return image


def _from_numpy(value: Any) -> Any:
    """Return an array of numbers as a tensor, and anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
        return value
    return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")).reshape(value.shape))


def _to_label(label: Any, name: str, class_names: list[str] | None) -> Tensor | int:
    """Return a label as an integer; ValueError for a word that no class name is, or another kind."""
    if isinstance(label, str) and class_names is None:
        remedy = "give integers from 0, or a dataset with class_names"
        raise ValueError(f"'class_labels' in {name} is {label!r}, but the dataset has no class_names; {remedy}")
    is_number = isinstance(label, Tensor) and label.ndim == 0 and not label.is_floating_point()
    if is_number or (isinstance(label, int) and not isinstance(label, bool)):
        return label
    if isinstance(label, Tensor):
        found = f"{label.dtype} {tuple(label.shape)}"
        raise ValueError(f"'class_labels' in {name} is {found}; give one integer from 0")
    return int(encode_labels([label], class_names, "the dataset", lambda _: name)[0])


@contextmanager
def _seed_generators(index: StreamIndex) -> Iterator[None]:
    """Seed the global generators by seed and position inside the block, and restore their states after it."""
    states = np.random.get_state(), random.getstate()
    entropy = index.rng().integers(2**32, size=3).tolist()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(entropy[0])
        np.random.seed(entropy[1])
        random.seed(entropy[2])
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])
