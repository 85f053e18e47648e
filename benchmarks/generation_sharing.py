"""Several texts of a question against one, and scoring a given text against writing it; parts of ``generation.py``."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from generation_engines import open_ours
from generation_model import MAX_NEW_TOKENS, MAX_SOURCE_TOKENS
from generation_rounds import Ids
from results import ratios, spread

from mmcot.decoding.engine import Engine, open_engine
from mmcot.decoding.requests import Request, Source, candidates
from mmcot.decoding.sampling import Sampling
from mmcot.texts.tokenizer import open_tokenizer

SHORT, NUM_CANDIDATES = 12, 8  # tokens of a text that is short against its source, such as an answer
DRAWN = Sampling(temperature=1.0, seed=0)


def sharing(folder: Path, sources: Ids, rounds: int) -> dict[str, Any]:
    """Ratios of processor time, round by round: candidates of a question, and scores of texts."""
    engine = open_engine(
        open_ours(folder),
        open_tokenizer(folder),
        num_rows=64,
        max_source_tokens=MAX_SOURCE_TOKENS,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    works = _candidates(engine, sources) | _scores(engine, sources)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            started = time.process_time()
            work()
            seconds[name].append(time.process_time() - started)
    found = {
        f"{NUM_CANDIDATES} candidates of {SHORT} tokens against one": ("candidates", "one"),
        "scoring a text against writing it, one at a time": ("score one", "write one"),
        "scoring a text against writing it, 64 rows": ("score", "write"),
        "scoring a text against writing it, 64 rows, sources encoded before": ("score kept", "write"),
    }
    result = {what: ratios(seconds[name], seconds[base]) for what, (name, base) in found.items()}
    for what, ratio in result.items():
        print(f"{what}: {spread(ratio)}", flush=True)
    return result


def _candidates(engine: Engine, sources: Ids) -> dict[str, Callable[[], Any]]:
    """One text of each source, and several."""

    def requests() -> list[Request]:
        limits = {"min_new_tokens": SHORT, "max_new_tokens": SHORT}
        return [
            Request(Source(source), key=str(number), sampling=DRAWN, **limits) for number, source in enumerate(sources)
        ]

    def several() -> None:
        engine.write([each for request in requests() for each in candidates(request, NUM_CANDIDATES)])

    return {"one": lambda: engine.write(requests()), "candidates": several}


def _scores(engine: Engine, sources: Ids) -> dict[str, Callable[[], Any]]:
    """Writing texts, and scoring the same ones."""
    texts = [text.ids for text in engine.write([Request(Source(source)) for source in sources])]
    kept = [Source(source, keep_states=True) for source in sources]
    engine.score(kept, texts)
    few = range(0, len(sources), 16)

    def fresh(numbers: Any) -> list[Source]:
        return [Source(sources[number]) for number in numbers]

    return {
        "write": lambda: engine.write([Request(source) for source in fresh(range(len(sources)))]),
        "score": lambda: engine.score(fresh(range(len(sources))), texts),
        "score kept": lambda: engine.score(kept, texts),
        "write one": lambda: [engine.write([Request(source)]) for source in fresh(few)],
        "score one": lambda: [engine.score([source], [texts[n]]) for n, source in zip(few, fresh(few), strict=True)],
    }
