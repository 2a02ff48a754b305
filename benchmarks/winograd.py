"""Where Winograd's filtering pays: the time of single 3x3 convolutions as a share of torch's in its better layout.

"kept" is inference with cached transformed weights, "anew" transforms them in each call, "train" does so and computes
all gradients. "expected" is the estimate of `winograd_time_ratio`; at 0.95 or less the filtering is used.
Run: python benchmarks/winograd.py
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from measure import measure_seconds
from torch import Tensor

from unet_denoiser.models.layers.conv import convolve_3x3, convolve_3x3_backward
from unet_denoiser.models.layers.rules import winograd_time_ratio

# batch size, input channels, output channels, image size
SHAPES = (
    *((16, 64, 64, 32), (16, 64, 128, 32), (1, 96, 96, 32), (4, 96, 96, 32), (16, 96, 96, 32)),
    *((16, 128, 64, 8), (16, 128, 64, 16), (64, 128, 64, 16), (16, 128, 128, 8), (64, 128, 128, 8), (16, 192, 64, 32)),
    *((1, 128, 128, 16), (1, 128, 128, 32), (2, 128, 128, 16), (4, 128, 128, 16), (16, 128, 128, 32)),
    *((1, 128, 128, 28), (16, 128, 128, 14), (16, 128, 128, 9), (64, 128, 128, 7), (4, 128, 128, 30)),
    *((1, 256, 256, 8), (1, 256, 256, 16), (2, 256, 256, 16), (4, 256, 256, 16), (16, 256, 256, 8)),
    *((16, 256, 256, 14), (16, 256, 256, 7), (16, 256, 256, 9), (1, 512, 256, 16), (16, 512, 256, 16)),
    *((1, 512, 512, 8), (4, 512, 512, 8), (16, 512, 512, 8), (16, 512, 512, 16), (1, 320, 320, 64)),
    *((1, 640, 640, 16), (1, 640, 640, 32), (2, 1280, 1280, 8), (16, 1280, 1280, 8)),
)
NEEDS_GRADIENT = (True, True, True)  # of x, weight and bias


def call_torch(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> None:
    F.conv2d(x, weight, bias, padding=1)
    sizes = [[1, 1], [1, 1], [1, 1], False, [0, 0], 1, NEEDS_GRADIENT]
    torch.ops.aten.convolution_backward(grad, x, weight, [len(weight)], *sizes)


def call_ours(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> None:
    convolve_3x3(x, weight, bias)
    convolve_3x3_backward(grad, x, weight, NEEDS_GRADIENT)


@torch.no_grad()
def main() -> None:
    """Print a row for each shape."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| batch | in | out | size | torch, ms | kept | expected | anew | expected | train |\n|" + "---|" * 10)
    for batch, in_ch, out_ch, size in SHAPES:
        x, grad = torch.randn(batch, in_ch, size, size), torch.randn(batch, out_ch, size, size)
        last, grad_last = (tensor.to(memory_format=torch.channels_last) for tensor in (x, grad))
        weight, bias = torch.nn.Parameter(torch.randn(out_ch, in_ch, 3, 3)), torch.randn(out_ch)
        calls = {
            "contiguous": partial(F.conv2d, x, weight, bias, padding=1),
            "channels last": partial(F.conv2d, last, weight, bias, padding=1),
            "kept": partial(convolve_3x3, last, weight, bias, cache=True),
            "anew": partial(convolve_3x3, last, weight, bias),
            "torch's training": partial(call_torch, x, weight, bias, grad),
            "torch's, channels last": partial(call_torch, last, weight, bias, grad_last),
            "train": partial(call_ours, last, weight, bias, grad_last),
        }
        for call in calls.values():
            call()
        times = measure_seconds(calls, rounds=3, min_seconds=0.05)
        forward = min(times["contiguous"], times["channels last"])
        training = min(times["torch's training"], times["torch's, channels last"])
        kept, anew = (winograd_time_ratio(in_ch, out_ch, x.shape, is_kept) for is_kept in (True, False))
        shares = (times["kept"] / forward, kept, times["anew"] / forward, anew, times["train"] / training)
        columns = (batch, in_ch, out_ch, size, f"{forward * 1e3:.2f}", *(f"{share:.2f}" for share in shares))
        print(f"| {' | '.join(map(str, columns))} |", flush=True)


if __name__ == "__main__":
    main()
