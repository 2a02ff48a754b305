"""Run in two processes by tests/sampling/pipeline/test_npz_shards.py: samples as files, and as one picture."""

import sys

import torch

from unet_denoiser.cli.app import main

if __name__ == "__main__":
    torch.set_num_threads(1)
    _, run, folder, picture, *options = sys.argv
    main(["sample", run, "--out", folder, *options])
    main(["sample", run, "--out", picture, *options, "--num-images", "5"])
    torch.distributed.destroy_process_group()
