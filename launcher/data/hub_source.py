"""A data set of the Hugging Face Hub, kept as a folder of ``save_to_disk``; all that follows reads that folder.

    hf://org/name                       its main branch, as it was when it was first read
    hf://org/name@v1.0:en               a revision (branch, tag or commit) and a configuration

``datasets`` reads it and runs no code of it: versions since 4 refuse scripts. A folder belongs to one URL and is read
from the Hub once. In it, ``hub.json`` has the commit:

    {"repo": "org/name", "config": "en", "revision": "v1.0", "commit": "3f1c..."}
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_folder, commit_json, exclusive, fingerprint, read_json
from mmcot.errors import InputError

HUB = "hf://"
RECORD = "hub.json"
_URL = re.compile(
    r"hf://(?:datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<config>[\w.+-]+))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "TimeoutException", "OfflineModeIsEnabled", "ConnectionError"}
_UNREACHABLE |= {"LocalEntryNotFoundError", "ProxyError", "Timeout"}


@dataclasses.dataclass(frozen=True)
class HubPlace:
    """A data set of the Hub: ``revision`` and ``config`` as given, or None."""

    url: str
    repo: str
    revision: str | None
    config: str | None

    @property
    def name(self) -> str:
        """A name for folders."""
        return self.repo.replace("/", "--") + (f"-{self.config}" if self.config else "")


def is_on_hub(path: str | Path | None) -> bool:
    """Whether a value of ``data.path`` names a data set of the Hub."""
    return path is not None and str(path).startswith(HUB)


def hub_place(url: str) -> HubPlace:
    """Take a URL apart.

    Raises:
        InputError: it has another form.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise InputError(
            f"data.path {url} is no data set of the Hugging Face Hub; expected hf://org/name, with @revision and "
            ":config where they are needed, such as hf://org/name@main:en"
        )
    return HubPlace(url, match["repo"], match["revision"], match["config"])


def hub_folder(url: str, parent: Path) -> Path:
    """The folder in ``parent`` that keeps a data set of the Hub."""
    place = hub_place(url)
    return parent / f"hub-{place.name}-{fingerprint([place.repo, place.revision, place.config])}"


def fetch(url: str, parent: Path, report: Callable[[str], None]) -> Path:
    """Return the folder of a data set of the Hub; it is read from there unless the folder exists.

    Raises:
        InputError: the URL is wrong, the Hub cannot be reached, or it has no such data set that can be read.
    """
    place, folder = hub_place(url), hub_folder(url, parent)
    if not (folder / RECORD).exists():  # no lock where it does, because the folder may be read-only
        with exclusive(parent):
            if not (folder / RECORD).exists():
                report(f"{url}: reading it from the Hugging Face Hub")
                staging = parent / f".staging-{folder.name}"
                shutil.rmtree(staging, ignore_errors=True)  # of a killed process
                _save(place, staging)
                commit_folder(staging, folder)
    report(f"{url} is commit {commit_of(folder)}, kept in {folder}; to read a later one, give @revision or delete it")
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit of which a folder keeps the data; None for a folder that is not of the Hub."""
    path = folder / RECORD
    record = read_json(path) if path.is_file() else None
    return record.get("commit") if isinstance(record, dict) else None


def _save(place: HubPlace, staging: Path) -> None:
    commit, is_confirmed = _resolve(place)
    try:
        loaded = _load(place, commit)
        found = _commit_in(loaded)
        _check_commit(place, commit, found, is_confirmed=is_confirmed)
        loaded.save_to_disk(str(staging))
    except InputError:
        raise
    except Exception as error:  # of datasets, pyarrow, huggingface_hub, httpx: each has its own types
        raise _in_words(place, error) from error
    commit_json(
        staging / RECORD,
        {"repo": place.repo, "config": place.config, "revision": place.revision, "commit": commit or found},
    )


def _load(place: HubPlace, commit: str | None) -> Any:
    """The one place that reads the Hub's data."""
    import datasets

    datasets.disable_progress_bars()  # they would be between our lines
    return datasets.load_dataset(place.repo, place.config, revision=commit or place.revision)


def _resolve(place: HubPlace) -> tuple[str | None, bool]:
    """The commit that a revision is, None where it is not known, and whether the Hub has confirmed it.

    Raises:
        InputError: the Hub answers that there is no such data set or revision.
    """
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(place.repo, revision=place.revision, timeout=30).sha, True
    except Exception as error:  # of huggingface_hub and httpx
        if _causes(error) & _UNREACHABLE or "timed out" in str(error):
            return _known_commit(place), False
        raise _in_words(place, error) from error


def _known_commit(place: HubPlace) -> str | None:
    """The commit that a revision was when the cache of huggingface_hub last saw it."""
    if place.revision and _COMMIT.fullmatch(place.revision):
        return place.revision
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"datasets--{place.repo.replace('/', '--')}" / "refs"
    path = folder / (place.revision or "main")
    known = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    return known if _COMMIT.fullmatch(known) else None


def _commit_in(loaded: Any) -> str | None:
    """The commit that is in the paths of the cache of ``datasets``; None where it is not."""
    parts = list(loaded.values()) if isinstance(loaded, dict) else [loaded]
    names = {Path(file["filename"]).parent.name for part in parts for file in part.cache_files}
    return next(iter(names)) if len(names) == 1 and _COMMIT.fullmatch(min(names)) else None


def _check_commit(place: HubPlace, commit: str | None, found: str | None, *, is_confirmed: bool) -> None:
    """Refuse what the cache gave instead: without the Hub, ``datasets`` takes its newest version of a data set."""
    if commit is not None and found is not None and found != commit:
        raise InputError(
            f"data.path {place.url}: {_state()}, and the cache holds commit {found[:12]} instead of {commit[:12]}; run "
            "once where the Hub can be reached, or give the commit that is there"
        )
    if not is_confirmed and (found is None or (commit is None and place.revision is not None)):
        raise InputError(
            f"data.path {place.url}: {_state()}, so which commit it is cannot be told; run once where the Hub can be "
            "reached, or give the whole commit as @revision"
        )


def _state() -> str:
    return "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hub cannot be reached from here"


def _causes(error: BaseException | None) -> set[str]:
    """The names of all types of an error and of those that it comes from."""
    names: set[str] = set()
    while error is not None and len(names) < 200:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def _in_words(place: HubPlace, error: Exception) -> InputError:
    causes, said = _causes(error), " ".join(str(error).split())[:300]
    page = f"https://huggingface.co/datasets/{place.repo}"
    if "GatedRepoError" in causes or "gated dataset" in said:
        why = f"it asks for permission; accept its terms on {page} and log in with `hf auth login`"
    elif "RevisionNotFoundError" in causes or said.startswith("Revision "):
        why = f"it has no revision {place.revision!r}; give a branch, tag or commit of {page}, or leave it out"
    elif "scripts are no longer supported" in said:
        why = (
            f"it is read by a script of its own, which is never run; try {HUB}{place.repo}@refs/convert/parquet, where "
            "the Hub keeps such data as files, or give one with files alone"
        )
    elif "Config name is missing" in said or "BuilderConfig" in said:
        why = f"it needs a configuration that it has, as {HUB}{place.repo}:CONFIG ({said})"
    elif "find cache for" in said:
        why = f"{_state()}, and the cache has it with other configurations alone ({said}); give one of them"
    elif causes & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        why = "it has no data files that can be read; look at its page"
    elif causes & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        why = "there is no such public data set; look at its spelling, or log in with `hf auth login` if it is private"
    elif causes & _UNREACHABLE:
        why = f"{_state()}, and it is not in the cache; run once where the Hub can be reached, or give a folder"
    else:
        why = f"it cannot be read ({type(error).__name__}: {said}); look at its page, or give a folder of its files"
    return InputError(f"data.path {place.url}: {why}")
