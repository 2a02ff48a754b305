"""Loading never holds the weights twice, in our own format and in another."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.networks import small
from unet_denoiser import UNet
from unet_denoiser.convert.checkpoint import export_checkpoint

LOAD = """
import json, re, sys
from unet_denoiser import UNet

def peak():  # of this process; resource.getrusage would count its parent's before exec
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

UNet.from_pretrained(sys.argv[1])  # imports and caches
before = peak()
model = UNet.from_pretrained(sys.argv[2], **json.loads(sys.argv[3]))
assert not any(p.is_meta for p in model.parameters())
sum(p.sum() for p in model.parameters()).item()  # every page is read
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("to", ["unet-denoiser", "adm"])
def test_loading_never_holds_the_weights_twice(to, tmp_path):
    sizes = {"model_channels": 128, "channel_mult": (1, 2, 4), "attention_resolutions": (), "context_dim": None}
    model = UNet(**sizes, num_heads=4, upsample="nearest", learned_null=False, time_frequencies="half")
    file, options = tmp_path / "model.safetensors", {"num_heads": 4, "qkv_order": "legacy"}
    if to == "adm":
        export_checkpoint(model.state_dict(), model.config, file, to)
    else:
        model.save_pretrained(tmp_path)
    size = file.stat().st_size
    assert size > 150e6
    small().save_pretrained(tmp_path / "small")
    source, options = (file, options) if to == "adm" else (tmp_path, {})
    command = [sys.executable, "-c", LOAD, str(tmp_path / "small"), str(source), json.dumps(options)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 * size < grown < 1.25 * size
