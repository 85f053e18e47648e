"""Opening what is saved in transformers' form: a folder, or an id of the Hugging Face Hub.

    with opening("t5-small", "the tokenizer"):
        AutoTokenizer.from_pretrained("t5-small", trust_remote_code=False)

Whatever transformers raises becomes one sentence that names the folder or id, the broken file if there is one, and
what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from mmcot.errors import InputError, MissingPackageError, MmcotError
from mmcot.file_kinds import fault_of, is_stand_in

_SETTINGS = ("*.json",)  # small, and read whenever they exist: transformers does without some that it cannot read
_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")
_OPTIONAL = ("trainer_state.json", "training_args.json")  # of a training, read by nobody


@contextlib.contextmanager
def opening(name: str | Path, what: str) -> Iterator[None]:
    """Turn errors of opening ``what`` from a folder or id into an ``InputError``.

    Errors of ours and a lack of memory pass as they are.

    Raises:
        InputError: a file of the folder is a pointer, a page or empty, or the block could not open it.
        MissingPackageError: transformers needs another package for it.
    """
    folder = folder_of(name)
    if folder is not None:
        for path in _files(folder, _SETTINGS):
            if is_stand_in(path):
                raise InputError(f"{what} cannot be opened: {fault_of(path, 'a file of a saved model')}")
    try:
        yield
    except (MmcotError, MemoryError):
        raise
    except ImportError as error:
        raise MissingPackageError(
            f"{what} of {name} needs a package that is not installed: {_first_line(error)}; install it with pip"
        ) from error
    except Exception as error:  # transformers and safetensors raise many types
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise InputError(_why(str(name), what, error)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of code in Rust, as in tokenizers
            raise
        raise InputError(_why(str(name), what, RuntimeError(str(error)))) from error


def _why(name: str, what: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"{what} of {name} needs code that comes with it (auto_map in its JSON files), which is never run; use one "
            "of transformers' own classes"
        )
    folder = folder_of(name)
    if folder is not None:
        faults = (fault_of(path, "a file of a saved model") for path in _files(folder, _FILES))
        if fault := next((fault for fault in faults if fault is not None), None):
            return f"{what} cannot be opened: {fault}"
    causes = _causes(error)
    if Path(name).is_dir():
        return f"{what} of the folder {name} cannot be opened: {_of_folder(Path(name), error)}"
    if Path(name).is_file():
        return f"{what} cannot be opened: {name} is a file; give the folder of a saved model that contains it"
    if "HFValidationError" in causes or name.startswith(("/", "./", "../", "~")):
        return f"{what} cannot be opened: the folder {name} does not exist; give one that does, or a Hugging Face id"
    return f"{what} {name!r} cannot be opened: {_of_id(causes, error)}"


def _of_folder(folder: Path, error: Exception) -> str:
    if not (folder / "config.json").is_file():
        return "it has no config.json; give the folder of a saved transformers model"
    if "no file named" in str(error) or "does not appear to have" in str(error):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
        return f"a file is missing (there are {there}); copy all files of the model there"
    return f"{_first_line(error)}; see that all of its files are of one model, and download it again if one was changed"


def _of_id(causes: set[str], error: Exception) -> str:
    if "GatedRepoError" in causes:
        return "it asks for permission; accept its terms on its page and log in with `hf auth login`"
    if "RepositoryNotFoundError" in causes:
        return "there is no such folder here and no such public model on the Hugging Face Hub; look at its spelling"
    if causes & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "ProxyError"}:
        state = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the Hub cannot be reached from here"
        return f"it is no folder, not in this machine's cache, and {state}; download it elsewhere and give its folder"
    return f"{_first_line(error)}; see that it is a whole model of transformers"


def _causes(error: BaseException | None) -> set[str]:
    """The names of the types of an error and of those it came from."""
    names: set[str] = set()
    while error is not None:
        names |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return names


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__} of transformers ({lines[0][:200] if lines else 'without a message'})"


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.name not in _OPTIONAL)
    return [path for path in found if path.is_file()]


def folder_of(name: str | Path) -> Path | None:
    """The folder of a saved model, in this machine's cache for an id; None where there is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(name), "config.json")
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
