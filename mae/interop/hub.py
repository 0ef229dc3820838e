"""Files of the Hugging Face hub: from the local cache, else from the network; one sentence where neither has them."""

import contextlib
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from mae.errors import ConfigError

PATIENCE_SECONDS = 5  # for the first answer of the hub; its own client tries for most of a minute


def fetch(name: str, file: str) -> Path:
    """A file of the repository `name`. Raises ConfigError where it cannot be had."""
    found = find(name, file)
    if found is None:
        raise ConfigError(f"{name} on the Hugging Face hub has no {file}: choose a model saved as safetensors")
    return found


def find(name: str, file: str) -> Path | None:
    """The same; None where the repository has no such file."""
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=True))
    except HFValidationError as error:
        raise ConfigError(f"{name} is no name on the Hugging Face hub: write OWNER/MODEL, or the path of a folder") from error
    require_network(name)
    try:
        return Path(huggingface_hub.hf_hub_download(name, file))
    except RepositoryNotFoundError as error:
        raise ConfigError(f"the Hugging Face hub has no {name}, or keeps it private: look it up at {_hub()}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{file} of {name} could not be fetched from the Hugging Face hub: try again later") from error


def require_network(name: str) -> None:
    """Raises ConfigError within a few seconds where the hub cannot be reached or is switched off."""
    way_out = f"fetch it once where there is a network, or give the path of a folder or file ({name} is not in the local cache)"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{name} needs the Hugging Face hub, which HF_HUB_OFFLINE switches off: {way_out}")
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # that is an answer too
            urllib.request.urlopen(urllib.request.Request(_hub(), method="HEAD"), timeout=PATIENCE_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"{name} needs the network, and {_hub()} does not answer: {way_out}") from error


def _hub() -> str:
    return huggingface_hub.constants.ENDPOINT
