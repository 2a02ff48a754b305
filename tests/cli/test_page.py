"""What `unet-denoiser app` refuses before it shows a page; tests/app/test_browser.py looks at the page."""

import socket
import subprocess
import sys

import pytest

from support.commands import error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing does not exist; give a run, a folder of runs, or a published pipeline's folder"),
        (["--data", "missing"], "data=missing is no folder; give one that holds data to train on"),
    ],
)
def test_missing_folders_are_one_line(here, capsys, arguments, message):
    assert message in error(capsys, "app", *arguments)


def test_addresses_that_cannot_be_used_are_one_line(here, capsys):
    pytest.importorskip("gradio")
    assert "port=0 must be from 1 to 65535" in error(capsys, "app", "--port", "0")
    assert "host='no such host' is no address of this machine" in error(capsys, "app", "--host", "no such host")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port={port} of host=127.0.0.1 cannot be used" in error(capsys, "app", "--port", port)


def test_without_gradio_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['gradio'] = None; from unet_denoiser.cli.app import main; main(['app'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "unet-denoiser: error: the page needs gradio: pip install 'unet-denoiser[app]'\n"


def test_the_command_imports_nothing_of_the_page():
    code = "import sys, unet_denoiser.cli.app; print([name for name in sys.modules if name.startswith('gradio')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
