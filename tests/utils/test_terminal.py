"""Streams without a reader, names that no terminal can show, and commands to paste."""

import os
import subprocess
import sys

import pytest

from unet_denoiser.utils.terminal import command, printable

COMMAND = f"{sys.executable} -m unet_denoiser"
REDIRECTIONS = ["| true", "2>&1 | true", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"]
NAMES = ["run", "2024: summer", "it's", "$HOME", "a\nb", "\x1b[31m", "~/x", "é", os.fsdecode(b"\xff")]
posix = pytest.mark.skipif(os.name != "posix", reason="redirections of bash")


@posix
@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_reader_that_goes_away_is_no_error(redirection):
    script = f"{COMMAND} train --help {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_a_full_disk_is_one_line():
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} train --help >/dev/full"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("unet-denoiser: error: ")
    assert done.stderr.count("\n") == 1
    assert "the standard output" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_stdout_that_cannot_hold_a_name(encoding, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    args = [sys.executable, "-m", "unet_denoiser", "info", str(tmp_path / "データ")]
    done = subprocess.run(args, capture_output=True, check=False, env=environment)
    assert done.returncode == 2
    assert rb"\u30c7\u30fc\u30bf" in done.stderr
    assert b"Traceback" not in done.stderr


def test_names_are_printed_in_one_line():
    assert printable("a\nb\x1b[31m\udce9 é データ") == r"a\nb\x1b[31m\udce9 é データ"


@posix
@pytest.mark.parametrize(
    "name", ["run", "2024: summer", "it's", "$HOME", "a\nb", "\x1b[31m", "~/x", "é", os.fsdecode(b"\xff")]
)
def test_commands_can_be_pasted(name):
    text = command("sample", name)
    assert "\n" not in text
    script = 'unet-denoiser() { printf %s "$2"; }; ' + text
    assert subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout == os.fsencode(name)
