"""The options of an export."""

from dataclasses import dataclass

from unet_denoiser.config.base import ExportFormat, ExportPrecision, check_minimum, check_types

# which precisions each format can hold, and what stands in the way of the others
_REFUSED = {
    (
        "openvino",
        "bfloat16",
    ): "OpenVINO would round the time as well, to 8 bits; sample --backend openvino embeds it outside",
    ("onnx", "bfloat16"): "onnxruntime has no bfloat16 convolutions for a CPU",
    ("onnx", "int8"): "only OpenVINO's quantisation is held",
    ("torch", "int8"): "only OpenVINO's quantisation is held",
}


@dataclass(frozen=True)
class ExportConfig:
    """The file that a network is exported to.

    Args:
        to: "onnx" (network.onnx, for onnxruntime and others), "openvino" (network.xml and .bin) or "torch"
            (network.pt2, a program of torch.export).
        precision: of the weights and of the arithmetic; the inputs, the output and the time's sinusoids are always
            float32. "int8" is for "openvino": weights and activations are quantised by ranges that the network's own
            samples have at all noise levels.
        image_size: fix the size, one number or height and width (default: any size; OpenVINO is then slow, until
            `reshape` fixes it).
        batch_size: fix the number of samples per call (default: any number).

    Raises:
        ValueError: an option that cannot work, with its name, its value and a valid one.
    """

    to: ExportFormat = "onnx"
    precision: ExportPrecision = "float32"
    image_size: tuple[int, ...] | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_minimum(self, 1, "batch_size")
        if any(n < 1 for n in self.image_size or ()):
            raise ValueError(f"image_size={self.image_size} must be at least 1")
        if (reason := _REFUSED.get((self.to, self.precision))) is not None:
            valid = [p for p in ("float32", "bfloat16", "float16", "int8") if (self.to, p) not in _REFUSED]
            raise ValueError(f"precision={self.precision!r} with to={self.to!r}: {reason}; give {' or '.join(valid)}")
