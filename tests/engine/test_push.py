"""A merge is uploaded to a hub that the test makes itself: huggingface_hub's API is replaced by a folder."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from checkpoints import digest, family

from r_tsvm_kernels import CheckpointError, ConfigError, MergeConfig, merge_checkpoints, push_to_hub
from r_tsvm_kernels.cli import main

huggingface_hub = pytest.importorskip("huggingface_hub", reason="pushes with huggingface_hub: pip install .[hub]")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one folder per repository. `calls` has what was asked; `broken` names a call that fails."""
    state = SimpleNamespace(root=tmp_path / "hub", calls=[], broken=None, private={})

    class Api:
        def _called(self, name):
            state.calls.append(name)
            if state.broken == name:
                raise RuntimeError("503 Server Error:\nService Unavailable")

        def whoami(self):
            self._called("whoami")
            return {"name": "user"}

        def create_repo(self, repo_id, *, private=None, exist_ok=False):
            self._called("create_repo")
            assert exist_ok
            folder = state.root / repo_id
            if not folder.exists():
                folder.mkdir(parents=True)
                (folder / ".gitattributes").touch()
                state.private[repo_id] = private

        def list_repo_files(self, repo_id):
            self._called("list_repo_files")
            folder = state.root / repo_id
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            self._called("upload_folder")
            assert "r_tsvm_kernels" in commit_message
            shutil.copytree(folder_path, state.root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return state


@pytest.fixture
def merged(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    config = MergeConfig("task_arithmetic", base_model=str(paths[0]), models=[str(paths[1])])
    return merge_checkpoints(config, tmp_path / "merged", shard_size="2KB").path


def test_everything_arrives(hub, merged):
    result = push_to_hub(merged, "user/name.7B", private=True)
    there = digest(hub.root / "user/name.7B")
    del there[".gitattributes"]
    assert there == digest(merged) and "README.md" in there
    assert result.files == {name: (merged / name).stat().st_size for name in there}
    assert result.url == "https://hub/user/name.7B/commit/1" and hub.private == {"user/name.7B": True}
    assert repr(result).endswith("https://hub/user/name.7B/commit/1)")
    assert push_to_hub(merged, "user/name.7B").files == result.files  # again, over the same files


def test_a_dry_run_asks_nobody(hub, merged):
    result = push_to_hub(merged, "user/name", dry_run=True)
    assert result.files.keys() == digest(merged).keys() and result.url is None and hub.calls == []
    assert repr(result).endswith("dry run)")


def test_other_files_are_not_mixed_in(hub, merged):
    (hub.root / "user/name").mkdir(parents=True)
    (hub.root / "user/name/model-00001-of-00009.safetensors").touch()
    with pytest.raises(ConfigError, match=r"user/name: holds model-00001-of-00009.safetensors, which would stay"):
        push_to_hub(merged, "user/name")
    assert "upload_folder" not in hub.calls


@pytest.mark.parametrize("repository", ["name", "a/b/c", "user/..", "user/na me", "user/a--b", ""])
def test_what_is_no_repository(hub, merged, repository):
    with pytest.raises(ConfigError, match="expected USER/NAME"):
        push_to_hub(merged, repository)
    assert hub.calls == []


def test_nothing_damaged_is_uploaded(hub, merged):
    shard = next(merged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="not what the merge wrote; see `rtsvm verify"):
        push_to_hub(merged, "user/name")
    assert "create_repo" not in hub.calls
    with pytest.raises(ConfigError, match=r"not the folder of a merge with its README\.md"):
        push_to_hub(merged / "nothing", "user/name")


@pytest.mark.parametrize("call", ["whoami", "create_repo", "list_repo_files", "upload_folder"])
def test_a_hub_that_fails(hub, merged, call):
    hub.broken = call
    with pytest.raises(CheckpointError, match=r"user/name: the hub refused \(RuntimeError: 503 .*: Service") as caught:
        push_to_hub(merged, "user/name")
    assert ("is complete: `rtsvm push" in str(caught.value)) == (call != "whoami")


def test_without_a_token_or_the_library(hub, merged, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="not logged in to the hub; run `hf auth login`"):
        push_to_hub(merged, "user/name")
    push_to_hub(merged, "user/name", dry_run=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="pip install huggingface_hub"):
        push_to_hub(merged, "user/name", dry_run=True)


# --- the command line ----------------------------------------------------------------------------------------------


def merge(tmp_path, *options, out="out"):
    if not (tmp_path / "in").exists():
        family(tmp_path / "in")
    models = ["--base", tmp_path / "in/base", "--model", tmp_path / "in/expert0", "--method", "task_arithmetic"]
    return main([str(word) for word in ("merge", *models, tmp_path / out, *options)])


def test_merge_and_push(hub, tmp_path, capsys):
    assert merge(tmp_path, "--push-to-hub", "user/name", "--private") == 0
    assert "-> https://hub/user/name/commit/1" in capsys.readouterr().out
    assert hub.calls[0] == "whoami" and hub.private == {"user/name": True}
    assert digest(tmp_path / "out").items() <= digest(hub.root / "user/name").items()


def test_merge_and_list(hub, tmp_path, capsys):
    assert merge(tmp_path, "--push-to-hub", "user/name", "--push-dry-run") == 0
    out = capsys.readouterr().out
    assert "  model.safetensors\n" in out and "  README.md\n" in out and "nothing was uploaded" in out
    assert hub.calls == []


@pytest.mark.parametrize(
    ("options", "out", "message"),
    [
        (["--push-to-hub", "name"], "out", "expected USER/NAME"),
        (["--push-to-hub", "user/name"], "out.safetensors", "merge into a folder"),
        (["--private"], "out", "are for --push-to-hub"),
        (["--push-dry-run"], "out", "are for --push-to-hub"),
    ],
)
def test_mistakes_are_found_before_the_work(hub, tmp_path, capsys, options, out, message):
    assert merge(tmp_path, *options, out=out) == 2
    assert message in capsys.readouterr().err and not (tmp_path / out).exists()


def test_a_failed_push_leaves_the_merge(hub, tmp_path, capsys):
    hub.broken = "upload_folder"
    assert merge(tmp_path, "--push-to-hub", "user/name") == 1
    assert f"{tmp_path / 'out'} is complete: `rtsvm push" in capsys.readouterr().err
    hub.broken = None
    assert main(["push", str(tmp_path / "out"), "user/name"]) == 0
    assert digest(tmp_path / "out").items() <= digest(hub.root / "user/name").items()
    assert main(["push", str(tmp_path / "nowhere"), "user/name"]) == 1
