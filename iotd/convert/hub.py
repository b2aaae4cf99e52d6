"""Fetches a checkpoint from a model hub: the files that conversion reads, at one revision, resumable."""

from pathlib import Path

from huggingface_hub import snapshot_download

from iotd.errors import CheckpointError
from iotd.model.package import Source

FILES = ["*.json", "*.safetensors", "*.jinja"]


def fetch(repo: str, revision: str | None = None) -> tuple[Path, Source]:
    """Download `repo`, such as `Qwen/Qwen3.5-0.8B`, into the hub's cache. What is there already is not fetched again.

    Returns the checkpoint's folder, and the repository with the commit that `revision` (a branch, a tag or a commit)
    stood for. The hub's own variables HF_ENDPOINT, HF_TOKEN and HF_HOME hold.
    Raises CheckpointError where the hub cannot be reached or does not have it.
    """
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:  # what all errors of huggingface_hub derive from
        why = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot fetch {repo} ({type(error).__name__}): {why}") from error
    return folder, Source(repo=repo, revision=folder.name)
