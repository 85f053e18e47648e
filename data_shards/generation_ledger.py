"""The ledger of generated texts: which model and seed each candidate of each question is of.

    for text in read_ledger("runs/demo/rationales"):
        text      # LedgerText(qid="10", candidate=0, seed=0, weights="9a1f...", split="train")

``data_shards/generated_texts.py`` writes it, an entry for each file of texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_shards.errors import ShardError
from data_shards.generated_texts import files_in_ledger, read_entry, read_output
from data_shards.text_lines import KEYS_OF_TEXTS, read_lines, texts_of


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerText:
    """One candidate of a question.

    ``seed`` and ``weights``, the sha256 of the model's weights, are None where an earlier version did not record them.
    """

    qid: str
    candidate: int
    seed: int | None
    weights: str | None
    split: str


def read_ledger(output_dir: str | Path) -> Iterator[LedgerText]:
    """Yield every text of an output, file after file; of one that is not complete, those of its committed files.

    An entry of an earlier version has no list of its texts; they are those of its file.

    Raises:
        ShardError: a text is there twice or missing. Every question has the candidates 0, 1, ... in order, and all
            questions equally many; no question of a split is there twice; there are as many as the manifest says.
        InputError: an entry was altered.
    """
    folder, seen, num_candidates = Path(output_dir), set[tuple[str, str]](), None
    for name, num_samples, entry in _entries(folder):
        texts = entry["texts"] if "texts" in entry else texts_of(read_lines(folder / name, KEYS_OF_TEXTS))
        split = name.partition("/")[0]
        num_candidates = num_candidates or max(1, len(texts) // max(1, num_samples))
        expected = [[each[0], number] for each in texts if each[1:] == [0] for number in range(num_candidates)]
        if texts != expected or len(texts) != num_samples * num_candidates:
            raise ShardError(
                f"{folder / name}: its {len(texts):,} texts are not {num_candidates} candidates of each of "
                f"{num_samples:,} questions, once each; delete {folder} and run again"
            )
        for qid, candidate in texts:
            if candidate == 0 and (split, qid) in seen:
                raise ShardError(
                    f"{folder / name}: question {qid} of split {split!r} is there a second time; delete {folder} and "
                    "run again"
                )
            seen.add((split, qid))
            yield LedgerText(qid, candidate, entry.get("seed"), entry.get("weights"), split)


def _entries(folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every file's name, number of questions and entry, which is empty where an earlier version has removed it."""
    path = folder / "manifest.json"
    manifest: dict[str, Any] = read_output(path) if path.exists() else {"complete": False}
    if manifest["complete"]:
        for name, file in sorted(manifest["files"].items()):
            entry = read_entry(folder, name) or {}
            if entry.get("sha256", file["sha256"]) != file["sha256"]:
                raise ShardError(
                    f"{folder / name}: its entry in the ledger is of another file than the manifest names; delete "
                    f"{folder} and run again"
                )
            yield name, file["num_samples"], entry
        return
    for name in files_in_ledger(folder):
        if entry := read_entry(folder, name):
            yield name, entry["num_samples"], entry
