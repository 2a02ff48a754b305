"""The share command as a user runs it: a folder, or a hub that is not there."""

import shutil

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from support.commands import error
from support.shared import make_run
from unet_denoiser.cli.app import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("share"), "pixels").path


pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def hub(here, monkeypatch):
    """A hub that keeps what it is sent in the folder `hub`, and its calls."""
    calls = []

    class Api:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, repo_id, exist_ok):
            assert exist_ok
            calls.append(("create_repo", repo_id))
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            calls.append(("upload_folder", repo_id, commit_message))
            assert "unet/*" in delete_patterns
            shutil.copytree(folder_path, here / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_folder_is_written_and_sampled(made, here, capsys):
    main(["share", str(made), "./shared/mine", "--license", "mit", "--device", "cpu"])
    assert capsys.readouterr().out == f"reading {made} ...\nshared/mine\n"
    assert 'from_pretrained("./mine")' in (here / "shared" / "mine" / "README.md").read_text()
    main(["sample", "shared/mine", "--num-images", "1", "--num-inference-steps", "2", "--device", "cpu"])
    assert (here / "mine-samples.png").is_file()
    main(["info", "shared/mine"])
    assert "total " in capsys.readouterr().out


def test_a_hub_name_is_uploaded(made, here, hub, capsys):
    main(["share", str(made), "owner/name", "--license", "mit", "--device", "cpu"])
    assert hub == ["whoami", ("create_repo", "owner/name"), ("upload_folder", "owner/name", "Shared by unet-denoiser")]
    assert capsys.readouterr().out.endswith("https://hub/owner/name\n")
    assert 'from_pretrained("owner/name")' in (here / "hub" / "README.md").read_text()
    assert not (here / "owner").exists()


@pytest.mark.parametrize("target", ["./owner/name", "owner", "taken/name", "a/b/c"])
def test_other_targets_are_folders(target, made, here, hub):
    (here / "taken").mkdir()
    main(["share", str(made), target, "--license", "mit", "--device", "cpu"])
    assert hub == []
    assert (here / target / "README.md").is_file()


def test_what_cannot_work_is_one_line(made, here, hub, capsys):
    licence = ["--license", "mit"]
    assert "license is not given" in (told := error(capsys, "share", made, "mine"))
    assert "mit, apache-2.0, cc-by-4.0" in told
    assert "license='MIT' is no licence as the hub writes them" in error(
        capsys, "share", made, "mine", "--license", "MIT"
    )
    (here / "mine").mkdir()
    assert "mine exists; give a new name" in error(capsys, "share", made, "mine", *licence)
    assert "holds no run" in error(capsys, "share", here / "mine", "other", *licence)
    assert "owner/na me" in error(capsys, "share", made, "owner/na me", *licence)
    assert not (here / "other").exists()
    assert hub == []


def test_without_a_login_nothing_is_made(made, monkeypatch, capsys):
    def whoami(self):
        raise LocalTokenNotFoundError("Token is required\nbut no token found")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", whoami)
    told = error(capsys, "share", made, "owner/name", "--license", "mit")
    assert (
        "owner/name cannot be uploaded: Token is required; `hf auth login` logs in, and ./owner/name is a folder"
        in told
    )


def test_what_diffusers_lacks_is_said(here, capsys):
    run = make_run(here / "made", "second image")
    main(["share", str(run.path), "mine", "--license", "mit", "--device", "cpu"])
    assert "without a copy for diffusers: concat='downscaled:2'" in capsys.readouterr().out
