"""Commands that several tests run."""

import pytest

from unet_denoiser.cli.app import main

TINY = "--model.model-channels 8 --model.num-res-blocks 1 --batch-size 4 --steps 3 --device cpu".split()  # noqa: SIM905


def error(capsys, *args):
    """Run a command that must fail; return its message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main([str(a) for a in args])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("unet-denoiser: error: ")
    assert captured.err.count("\n") == 1
    return captured.err
