"""Where Winograd's filtering pays: single 3x3 convolutions, its time as a share of torch's own in its better layout.

"kept" is inference with transformed weights kept, "anew" transforms them in each call, as training does.
Run: python benchmarks/winograd.py
"""

from functools import partial

import torch
import torch.nn.functional as F
from measure import fastest

from unet_denoiser.conv import _convolve

SHAPES = ((64, 64, 32), (128, 128, 32), (256, 128, 32), (256, 256, 16), (512, 256, 16), (256, 256, 8), (512, 512, 8))


def main() -> None:
    """One row for each shape and batch."""
    print("| batch | in | out | size | pixels | torch, ms | kept | anew |\n|---|---|---|---|---|---|---|---|")
    for batch in (1, 4, 16):
        for in_ch, out_ch, size in SHAPES:
            x = torch.randn(batch, in_ch, size, size)
            last = x.to(memory_format=torch.channels_last)
            weight, bias = torch.nn.Parameter(torch.randn(out_ch, in_ch, 3, 3)), torch.randn(out_ch)
            calls = {
                "contiguous": partial(F.conv2d, x, weight, bias, padding=1),
                "channels last": partial(F.conv2d, last, weight, bias, padding=1),
                "kept": partial(_convolve, last, weight, bias, cache=True),
                "anew": partial(_convolve, last, weight, bias, cache=False),
            }
            with torch.no_grad():
                for call in calls.values():
                    call()
                times = fastest(calls, rounds=3, at_least=0.05)
            torchs = min(times["contiguous"], times["channels last"])
            shares = " | ".join(f"{times[name] / torchs:.2f}" for name in ("kept", "anew"))
            print(
                f"| {batch} | {in_ch} | {out_ch} | {size} | {batch * size**2} | {torchs * 1e3:.2f} | {shares} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
