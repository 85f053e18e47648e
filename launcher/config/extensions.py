"""Extensions: modules on the Python path that add entries to the tables of bridges, chains and so on.

    # my_parts.py
    CHAINS = {"draft-first": Chain(...)}

    # settings
    extensions: [my_parts]

A module offers plain dicts under the names of ``TABLES``. They are merged when settings are loaded, in every process:
the driver, Ray's workers, the ranks and the loaders. An extension is code of the user's own and is imported as such.
It is never imported from a run's folder, and a run's folder never decides on its own that one is imported
(``launcher/runs/run_settings.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from mmcot.errors import InputError

# The dict that a module may offer: the module of the table with the same name, and the class of its entries.
TABLES = {
    "CHAINS": ("launcher.config.chains", "Chain"),
    "FORMS": ("data_shards.sources.forms", "Form"),
    "METRICS": ("mmcot.metrics.table", "Metric"),
    "ENCODERS": ("mmcot.vision.encoder_kinds", "Encoder"),
    "BRIDGES": ("mmcot.models.fusion", "Bridge"),
}
_RUN_FILES = ("run.yaml", "lock.json")

_loaded: set[str] = set()  # the modules that this process has merged


class ExtensionError(InputError):
    """An extension that cannot be used; the message names it."""


def load_extensions(names: Iterable[str]) -> None:
    """Import modules and merge what they offer, once a process.

    Raises:
        ExtensionError: a module does not exist, cannot be imported, is in a run's folder, offers nothing, or offers an
            entry of another type or a name that exists.
    """
    for name in names:
        if name in _loaded:
            continue
        _find(name)
        try:
            module = importlib.import_module(name)
        except Exception as error:
            raise ExtensionError(
                f"extension {name!r} cannot be imported: {type(error).__name__}: {error}; mend the module"
            ) from error
        offered = {table: entries for table in TABLES if (entries := getattr(module, table, None))}
        if not offered:
            raise ExtensionError(f"extension {name!r} offers nothing; it needs a dict named {', '.join(TABLES)}")
        known = {table: getattr(importlib.import_module(TABLES[table][0]), table) for table in offered}
        for table, entries in offered.items():  # all are checked before one is merged
            if not isinstance(entries, dict):
                raise ExtensionError(f"extension {name!r}: {table} is a {type(entries).__name__}, expected a dict")
            for key, entry in entries.items():
                _check_entry(name, table, key, entry)
            if taken := sorted(entries.keys() & known[table].keys()):
                raise ExtensionError(
                    f"extension {name!r}: {table} has {taken[0]!r}, which exists already; give it another name"
                )
        for table, entries in offered.items():
            known[table].update(entries)
        _loaded.add(name)


def _check_entry(name: str, table: str, key: object, entry: object) -> None:
    module, kind = TABLES[table]
    expected = getattr(importlib.import_module(module), kind)
    if table == "BRIDGES":
        is_right, kind = isinstance(entry, type) and issubclass(entry, expected), f"subclass of {kind}"
    else:
        is_right = isinstance(entry, expected)
    if not is_right:
        raise ExtensionError(f"extension {name!r}: {table}[{key!r}] is {entry!r}, expected a {kind} of {module}")
    if table == "CHAINS" and getattr(entry, "name", key) != key:
        raise ExtensionError(
            f"extension {name!r}: CHAINS[{key!r}] is a chain named {entry.name!r}; give both the same name"  # pyright: ignore[reportAttributeAccessIssue]
        )


def is_loaded(name: str) -> bool:
    """Whether this process has merged a module."""
    return name in _loaded


def sha256_of_module(name: str) -> str:
    """Return the sha256 of a module's file, or of all Python files of a package, without importing it.

    Raises:
        ExtensionError: as ``load_extensions``, where the module cannot be found.
    """
    path, is_package = _find(name)
    digest = hashlib.sha256()
    for file in sorted(path.parent.rglob("*.py")) if is_package else [path]:
        digest.update(f"{file.relative_to(path.parent)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _find(name: str) -> tuple[Path, bool]:
    """Return a module's file and whether it is a package's; the packages above a dotted name are imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise ExtensionError(
            f"extension {name!r} cannot be found: {error}; give the name of a module on the Python path"
        ) from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise ExtensionError(
            f"extension {name!r} is no module on the Python path; install it, or set PYTHONPATH to its folder"
        )
    path = Path(spec.origin).resolve()
    if found := next((folder for folder in path.parents if all((folder / file).exists() for file in _RUN_FILES)), None):
        raise ExtensionError(f"extension {name!r} is in the folder of a run ({found}); move it elsewhere")
    return path, bool(spec.submodule_search_locations)
