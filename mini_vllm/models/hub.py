"""From the `model` argument to a directory with config.json in it."""

from __future__ import annotations

import os
from pathlib import Path

# Weights are taken from safetensors only: pickled .bin files can run code when they are loaded.
_FILES = ["*.json", "*.safetensors", "*.jinja"]
_NOT_FILES = ["consolidated*", "*/*"]


def resolve_model(model: str, revision: str | None = None) -> Path:
    """A local directory as it is; anything else is a Hugging Face hub id and is downloaded into the hub's cache.

    Honours HF_HOME, HF_TOKEN and HF_HUB_OFFLINE. Raises `ValueError` when there is no such directory and
    the hub has no such model or cannot be reached.
    """
    path = Path(os.path.expanduser(model))  # unlike Path's methods, os.path raises for no name at all
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is a directory without config.json; give a directory of an HF checkpoint")
        return path
    if os.path.isfile(path):
        raise ValueError(f"{path} is a file; give the directory that holds config.json and *.safetensors")

    from huggingface_hub import snapshot_download  # 0.2 s, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT_FILES))
    except HFValidationError:
        raise ValueError(f"model {model!r} is neither a directory nor a hub id such as Qwen/Qwen3-0.6B") from None
    except LocalEntryNotFoundError:
        raise ValueError(
            f"model {model!r} is not a local directory, is not in the hub cache, and the Hugging Face hub cannot be "
            "reached (no network, or HF_HUB_OFFLINE is set); download it elsewhere and give the path of its directory"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"model {model!r} could not be downloaded from the Hugging Face hub: {error}") from None
