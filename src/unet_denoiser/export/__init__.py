"""Networks as files for other engines: ONNX, OpenVINO, programs of torch.export."""

from unet_denoiser.export.exporter import ExportReport as ExportReport
from unet_denoiser.export.exporter import ExportRequest as ExportRequest
from unet_denoiser.export.exporter import export_network as export_network
