"""`hf:owner/repo/path@revision`: through huggingface_hub's knowledge, downloaded by our own downloader.

The hub's client names the errors (gated, missing, wrong token), reads HF_TOKEN or the token `hf auth login`
stored, and knows its cache: a file another tool has fetched already is used, not fetched again. The transfer
itself is ours, because the client's does not go on where an earlier process stopped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from calm.errors import SourceError
from calm.registry.reference import HfReference
from calm.sources.download import Remote

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

_SHA256 = re.compile(r"[0-9a-f]{64}")


def resolve_hub(reference: HfReference, sha256: str | None, env: Mapping[str, str]) -> Path | Remote:
    """A file of the hub's local cache, or where to download it. Blocking. Raises SourceError.

    With `sha256` (a part that is the whole model) a file that cannot match is refused before it is fetched.
    """
    from huggingface_hub import get_token, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(
        reference.repo, reference.member, cache_dir=_cache_dir(env), revision=reference.revision
    )
    if isinstance(cached, str):
        return Path(cached)
    endpoint = env.get("HF_ENDPOINT") or None
    token = env.get("HF_TOKEN") or get_token()
    url = hf_hub_url(reference.repo, reference.member, revision=reference.revision, endpoint=endpoint)
    metadata = _metadata(url, token, endpoint, reference)
    published = (metadata.etag or "").strip('"')
    if sha256 is not None and _SHA256.fullmatch(published) and published != sha256:
        raise SourceError(
            f"{_spelled(reference)} has sha256 {published}, but the card expects {sha256}. "
            "Another revision or file is meant, or the card's digest is wrong."
        )
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return Remote(url, headers=headers)


def _cache_dir(env: Mapping[str, str]) -> str | None:
    if chosen := env.get("HF_HUB_CACHE"):
        return chosen
    home = env.get("HF_HOME")
    return str(Path(home).expanduser() / "hub") if home else None


def _metadata(url: str, token: str | None, endpoint: str | None, reference: HfReference) -> HfFileMetadata:
    """HEAD of the file. The order of the branches is from the special error to the general one."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = _spelled(reference)
    try:
        return get_hf_file_metadata(url, token=token or False, endpoint=endpoint)
    except GatedRepoError as error:
        raise SourceError(
            f"{where} is gated. Accept its terms on the repository's page "
            "and set HF_TOKEN to a token that may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{where}: the repository has no such revision. Check it in the card.") from error
    except EntryNotFoundError as error:
        raise SourceError(f"{where}: the repository has no such file at this revision.") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{where}: no such repository, or a private one: then set HF_TOKEN to a token that may read it."
        ) from error
    except HfHubHTTPError as error:
        raise SourceError(f"{where}: the hub refused: {error}") from error
    except Exception as error:  # transport errors: their classes belong to whichever client the hub uses
        raise SourceError(
            f"{where}: the hub does not answer ({type(error).__name__}). Check the network and HF_ENDPOINT."
        ) from error


def _spelled(reference: HfReference) -> str:
    return f"hf:{reference.repo}/{reference.member}@{reference.revision}"
