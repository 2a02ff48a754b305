"""Run in two processes by tests/training/test_distributed.py: DDP, resuming with DDP, and FSDP2; compiled too.

Accelerate does not shard on CPUs; here its code for that is switched on all the same.
"""

import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from unet_denoiser import Run
from unet_denoiser.training import distributed
from unet_denoiser.training.checkpoints import parse_step
from unet_denoiser.training.loop import load_trainer, train


def sharding(**options):
    accelerator = accelerate.Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def finish(path, start):
    run = Run.load(path)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    assert [parse_step(file) for file in run.checkpoints.paths()] == [start]
    trainer = load_trainer(run)
    assert trainer.accelerator.num_processes == 2
    for _ in train(run, trainer):
        pass
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    first = finish(folder / "ddp", 2)
    assert type(first.prepared).__name__ == "DistributedDataParallel"
    if sys.argv[2:] != ["distilled"]:
        if first.accelerator.is_main_process:
            shutil.copy(Run.load(folder / "ddp").checkpoints.find("3"), folder / "again" / "checkpoints")
        finish(folder / "again", 3)
        torch.compile = partial(torch.compile, backend="aot_eager")  # without generating code
        warnings.filterwarnings("error", "compile=True")  # as when torch cannot compile
        finish(folder / "ddp-compiled", 2)
    distributed.Accelerator = sharding
    sharded = finish(folder / "fsdp", 2)
    assert all(isinstance(p, DTensor) for p in sharded.model.parameters())
    assert all(isinstance(a, DTensor) for a in sharded.ema.averages().values())
    if sys.argv[2:] != ["distilled"]:
        finish(folder / "fsdp-compiled", 2)
    torch.distributed.destroy_process_group()
