"""Upload a finished merge to the Hugging Face hub, through huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CheckpointError, ConfigError, RtsvmError
from ..sizes import format_size
from ..text import some
from .verify import verify_output

CARD = "README.md"
# Files that the hub itself puts into a new repository.
_ITS_OWN = {".gitattributes"}


@dataclass(frozen=True)
class PushResult:
    """What was uploaded, or would be.

    Attributes:
        repository: id on the hub.
        files: bytes by file name.
        url: of the commit; None after a dry run.
    """

    repository: str
    files: dict[str, int]
    url: str | None = None

    def __repr__(self) -> str:
        size = format_size(sum(self.files.values()))
        return f"PushResult({len(self.files)} files, {size}, {self.url or 'dry run'})"


def push_to_hub(out: str | Path, repository: str, *, private: bool | None = None, dry_run: bool = False) -> PushResult:
    """Upload the folder of a finished merge, with its model card and report, to a model repository on the hub.

    The repository is made if it does not exist. The files are checked against the checksums of the merge first, so that
    nothing damaged is uploaded. The environment variables of huggingface_hub (HF_TOKEN, HF_ENDPOINT, ...) apply. The
    card, the recipe and the report name the models as the recipe does, with local paths if it has any.

    Args:
        out: folder that `merge_checkpoints` wrote.
        repository: ``user/name``.
        private: whether a new repository is private; None leaves it to the settings of the account.
        dry_run: check everything that needs no network, and upload nothing.

    Returns:
        PushResult: the files with their sizes in bytes, and the URL of the commit.

    Raises:
        ConfigError: huggingface_hub is not installed, not logged in, or `repository` is no id; the output is a single
            file; or the repository holds files that are not of this merge.
        CheckpointError: the output is not what was written, or the upload failed.

    Examples:
        >>> from r_tsvm_kernels import push_to_hub
        >>> push_to_hub("merged", "user/merged", dry_run=True)  # doctest: +SKIP
        PushResult(8 files, 1.1 MB, dry run)
    """
    out = Path(out)
    check_target(repository, log_in=not dry_run)
    if not (out / CARD).is_file():
        raise ConfigError(f"{out}: not the folder of a merge with its {CARD}; merge into a folder to push it")
    if not verify_output(out).ok:
        raise CheckpointError(f"{out}: not what the merge wrote; see `rtsvm verify {out}`, and merge again")
    files = {path.relative_to(out).as_posix(): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    if dry_run:
        return PushResult(repository, files)
    with _reported(repository, f"; {out} is complete: `rtsvm push {out} {repository}` tries again"):
        api = _library().HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        others = sorted({*api.list_repo_files(repository)} - {*files} - _ITS_OWN)
        if others:
            raise ConfigError(
                f"{repository}: holds {some(others)}, which would stay among the files of the merge; delete them "
                "there, or choose another name"
            )
        commit = api.upload_folder(
            repo_id=repository, folder_path=out, commit_message=f"Merge made with r_tsvm_kernels {__version__}"
        )
    return PushResult(repository, files, str(commit.commit_url))


def check_target(repository: str, *, log_in: bool = True) -> None:
    """Check what an upload needs, before work is done for it.

    Args:
        repository: id on the hub.
        log_in: ask the hub who the token belongs to.

    Raises:
        ConfigError: huggingface_hub is not installed, or not logged in; `repository` is no id.
        CheckpointError: the hub does not answer.
    """
    library = _library()
    try:
        library.utils.validate_repo_id(repository)
        valid = repository.count("/") == 1
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"{repository!r} is no repository on the hub; expected USER/NAME")
    if not log_in:
        return
    if not library.get_token():
        raise ConfigError(f"{repository}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN")
    with _reported(repository):
        library.HfApi().whoami()


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError("to push to the hub, run: pip install huggingface_hub") from error
    return huggingface_hub


@contextmanager
def _reported(repository: str, then: str = "") -> Iterator[None]:
    """Turn errors of the library, whose classes depend on its version, into our own."""
    try:
        yield
    except RtsvmError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{repository}: the hub refused ({type(error).__name__}: {reason}){then}") from error
