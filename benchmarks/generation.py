"""Speed of text generation, compared with transformers' own generate.

    python benchmarks/generation.py [DATA_SET] [--model DIR] [--questions 256] [--rounds 3] [--out DIR]

The model has T5-small's size and is trained for some minutes on 48 short pairs of the data
set, so that it writes words and ends its texts (stored in DIR for the next time). Then every
engine writes, for each question, exactly as many tokens as the real explanation has: equal
work on real lengths. Rounds alternate between the engines; printed are tokens per CPU-second
on one thread (wall time depends on other processes of the machine), the median of the
ratios round by round and their range. Both engines stop a row at its length; transformers
continues until the longest row of a batch has ended, in data order, as it is usually called.

Then, free-running: ids equal to generate's, with the margin between the two best logits
where they differ; and the peak memory for few and for many questions. ``generation.json`` has
all numbers. DATA_SET: see ``results.data_set``.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from results import data_set, ratios, summary, write_results
from transformers import StoppingCriteria, StoppingCriteriaList

from data_shards.sources.forms import read_questions
from mmcot.decoding.engine import Engine, open_engine
from mmcot.decoding.generation import generate_ids
from mmcot.models.t5 import MultimodalT5Config, T5ForMultimodalGeneration
from mmcot.texts.encoding import EncodedPair, collate, encode_pair
from mmcot.texts.prompts import build_pair
from mmcot.texts.tokenizer import open_tokenizer, train_tokenizer

MAX_NEW_TOKENS, SHAPE = 256, (100, 256)


def train_model(texts: list[tuple[str, str]], folder: Path, seconds: float) -> None:
    """Fit a T5 of small size to the short pairs of the texts and save it with a tokenizer of 8000 pieces."""
    tokenizer = train_tokenizer((text for pair in texts for text in pair), folder, vocab_size=8000)
    pairs = [encode_pair(tokenizer, *pair, max_source_tokens=512, max_target_tokens=MAX_NEW_TOKENS) for pair in texts]
    pairs = [pair for pair in pairs if len(pair.source_ids) <= 64 and 8 <= len(pair.target_ids) <= 48]
    torch.manual_seed(0)
    config = MultimodalT5Config(
        vocab_size=len(tokenizer),
        d_model=512,
        d_ff=2048,
        num_layers=6,
        num_heads=8,
        d_kv=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    model, chance, started = T5ForMultimodalGeneration(config).train(), random.Random(0), time.process_time()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(100_000):
        if time.process_time() - started > seconds:
            break
        chosen = sorted(chance.sample(pairs, 16), key=lambda pair: len(pair.target_ids))[8 * (step % 2) :][:8]
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 50)
        loss = model(**collate(chosen, [None] * len(chosen), feature_shape=SHAPE, pad_token_id=0)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}, loss {loss.item():.2f}, {len(pairs)} pairs", flush=True)
    print(f"trained {step} steps, loss of the last batch {loss.item():.2f}", flush=True)
    model.eval().save_pretrained(folder)


class OwnLengths(StoppingCriteria):
    """A row has ended when it has its own number of tokens."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """Which rows have ended, bool [B]."""
        return input_ids.shape[1] - 1 >= self.lengths


def with_transformers(
    model, pairs: list[EncodedPair], *, batch_size: int, use_cache: bool = True, pad_to: int = 0
) -> list[list[int]]:
    """``generate`` in data order, each batch until its longest row has its number of tokens."""
    settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id, settings.do_sample, settings.num_beams, settings.use_cache = None, False, 1, use_cache
    written = []
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        width = max([pad_to, *(len(pair.source_ids) for pair in chosen)])
        ids = torch.tensor([[*pair.source_ids, *[0] * (width - len(pair.source_ids))] for pair in chosen])
        lengths = [len(pair.target_ids) for pair in chosen]
        settings.max_new_tokens = max(lengths)
        outputs = model.generate(
            input_ids=ids,
            attention_mask=(ids != 0).long(),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([OwnLengths(lengths)]),
        )
        written += [row[1 : 1 + length] for row, length in zip(outputs.tolist(), lengths, strict=True)]
    return written


def with_ours(model, pairs: list[EncodedPair], *, num_rows: int, engine: Engine | None = None) -> list[list[int]]:
    """All texts; without an engine one is opened, which packs the weights, as a worker does once for all its tasks."""
    return generate_ids(
        model,
        [pair.source_ids for pair in pairs],
        [None] * len(pairs),
        feature_shape=SHAPE,
        num_rows=num_rows,
        max_new_tokens=[len(pair.target_ids) for pair in pairs],
        eos_token_ids=(),
        engine=engine,
    )


def make_ctranslate2(model, tokenizer, folder: Path):
    """The same weights in CTranslate2 (fp32, one thread), or None where it is not installed.

    Only a plain T5 is accepted: the fusion is left out, which text without pictures does not use.
    """
    try:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter
    except ImportError:
        print("CTranslate2 is not installed: it is left out", flush=True)
        return None
    from transformers import T5Config, T5ForConditionalGeneration

    names = (
        "vocab_size",
        "d_model",
        "d_ff",
        "num_layers",
        "num_heads",
        "d_kv",
        "pad_token_id",
        "eos_token_id",
        "decoder_start_token_id",
        "feed_forward_proj",
    )
    plain = T5ForConditionalGeneration(T5Config(**{name: getattr(model.config, name) for name in names}))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()})
    plain.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    TransformersConverter(str(folder / "plain")).convert(str(folder / "converted"), force=True)
    config = json.loads((folder / "converted" / "config.json").read_text())
    config |= {
        name: tokenizer.pad_token for name, token in config.items() if name.endswith("_token") and token is None
    }  # null is not accepted
    (folder / "converted" / "config.json").write_text(json.dumps(config))
    return ctranslate2.Translator(
        str(folder / "converted"), device="cpu", compute_type="float32", inter_threads=1, intra_threads=1
    )


def with_ctranslate2(translator, tokenizer, pairs: list[EncodedPair], *, batch_size: int) -> None:
    """Batches in data order, each row stopped at its own length."""
    for start in range(0, len(pairs), batch_size):
        chosen = pairs[start : start + batch_size]
        lengths = [len(pair.target_ids) for pair in chosen]
        written = translator.translate_batch(
            [tokenizer.convert_ids_to_tokens(pair.source_ids) for pair in chosen],
            beam_size=1,
            max_decoding_length=max(lengths),
            min_decoding_length=max(lengths),
            callback=lambda step, lengths=lengths: step.step + 1 >= lengths[step.batch_id],
        )
        got = [len(row.hypotheses[0]) for row in written]
        assert all(abs(a - b) <= 1 for a, b in zip(got, lengths, strict=True)), (got, lengths)


def compare(name: str, engines: dict, num_tokens: int, rounds: int) -> dict:
    """Alternate between the engines; print and return tokens a CPU-second of each and the ratios to the first."""
    rates = {engine: [] for engine in engines}
    for _ in range(rounds):
        for engine, write in engines.items():
            started = time.process_time()
            write()
            rates[engine].append(num_tokens / (time.process_time() - started))
    first, found = next(iter(engines)), {}
    for engine, values in rates.items():
        found[engine] = {"tokens_per_processor_second": summary(values), "ratio": ratios(values, rates[first])}
        ratio = found[engine]["ratio"]
        print(
            f"{name} {engine:<28} {statistics.median(values):7.0f} tokens/s   x{ratio['median']:5.2f} "
            f"({ratio['low']:.2f} to {ratio['high']:.2f})",
            flush=True,
        )
    return found


def compare_ids(model, pairs: list[EncodedPair]) -> dict:
    """Compare free-running greedy ids: generate's for one prompt at a time, ours for all prompts."""
    ours = generate_ids(
        model,
        [pair.source_ids for pair in pairs],
        [None] * len(pairs),
        feature_shape=SHAPE,
        num_rows=32,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_ids=(1,),
    )
    num_equal, parted = 0, []
    for pair, ids in zip(pairs, ours, strict=True):
        source = torch.tensor([pair.source_ids])
        theirs = model.generate(
            input_ids=source,
            attention_mask=torch.ones_like(source),
            do_sample=False,
            num_beams=1,
            max_new_tokens=MAX_NEW_TOKENS,
        )[0, 1:].tolist()
        num_equal += theirs == ids
        if theirs != ids:
            place = next(i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b)
            best = (
                model(input_ids=source, decoder_input_ids=torch.tensor([[0, *ids[:place]]]))
                .logits[0, -1]
                .topk(2)
                .values
            )
            parted.append(f"token {place}: margin {best[0] - best[1]:.1e}")
    found = {
        "texts": len(pairs),
        "equal": num_equal,
        "ended": sum(ids[-1] == 1 for ids in ours),
        "distinct_tokens": float(np.mean([len(set(ids)) / len(ids) for ids in ours])),
        "different_texts": len({tuple(ids) for ids in ours}),
        "differ_at": parted,
    }
    print(
        f"{model.dtype} free-running: {num_equal} of {len(pairs)} equal to generate, "
        f"{found['ended']} ended with the end token, distinct tokens {found['distinct_tokens']:.0%}, "
        f"{found['different_texts']} different texts; they differ at: {parted or 'none'}",
        flush=True,
    )
    return found


def peak_memory(arguments: argparse.Namespace, num_questions: int) -> float:
    """GB of a fresh process that writes this many texts."""
    command = [
        sys.executable,
        __file__,
        str(arguments.data),
        "--model",
        str(arguments.model),
        "--questions",
        str(num_questions),
        "--memory",
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory()
    with data_set(arguments.data) as (arguments.data, name), folder as place, torch.inference_mode():
        arguments.model = arguments.model or Path(place)
        measure(arguments, name)


def measure(arguments: argparse.Namespace, data_name: str) -> None:
    texts = [build_pair(problem, "QCM-E") for problem in read_questions(arguments.data).problems["train"]]
    if not (arguments.model / "config.json").exists():
        with torch.inference_mode(False):
            train_model(texts, arguments.model, arguments.train_s)
    tokenizer = open_tokenizer(arguments.model)
    model = T5ForMultimodalGeneration.from_pretrained(arguments.model, trust_remote_code=False).eval()
    pairs = [encode_pair(tokenizer, *pair, max_source_tokens=512, max_target_tokens=MAX_NEW_TOKENS) for pair in texts][
        -arguments.questions :
    ]
    if arguments.memory:
        with_ours(model, pairs, num_rows=arguments.batch_size)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
        return
    lengths = [len(pair.target_ids) for pair in pairs]
    print(
        f"{len(pairs)} questions, source {np.mean([len(pair.source_ids) for pair in pairs]):.0f} tokens, "
        f"target {np.mean(lengths):.0f} (longest {max(lengths)})"
    )
    report: dict = {"data": data_name, "questions": len(pairs), "target_tokens": sum(lengths), "dtypes": {}}
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        model, name = model.to(dtype), str(dtype).removeprefix("torch.")
        engines = {"transformers": lambda model=model: with_transformers(model, pairs, batch_size=32)}
        for num_rows in sorted({arguments.batch_size, 2 * arguments.batch_size}):
            engines[f"ours, {num_rows} rows"] = lambda num_rows=num_rows, model=model: with_ours(
                model, pairs, num_rows=num_rows
            )
        rows = 2 * arguments.batch_size
        engine = open_engine(model, num_rows=rows, max_source_tokens=512, max_new_tokens=MAX_NEW_TOKENS)
        engines[f"ours, {rows} rows, kept engine"] = lambda rows=rows, model=model, engine=engine: with_ours(
            model, pairs, num_rows=rows, engine=engine
        )
        if dtype == torch.float32 and (
            translator := make_ctranslate2(model, tokenizer, arguments.model / "ctranslate2")
        ):
            engines["CTranslate2, data order"] = lambda translator=translator: with_ctranslate2(
                translator, tokenizer, pairs, batch_size=32
            )
        written = with_ours(model, pairs, num_rows=arguments.batch_size)
        distinct = np.mean([len(set(ids)) / len(ids) for ids in written])
        assert [len(ids) for ids in written] == lengths, "a text has another length than asked for"
        if distinct <= 0.25:
            raise SystemExit(
                f"{distinct:.0%} of a text's tokens are distinct, expected more than 25%: the model only repeats; "
                f"train longer (--train-s, now {arguments.train_s:.0f})"
            )
        report["dtypes"][name] = found = {"engines": compare(name, engines, sum(lengths), arguments.rounds)}
        if dtype == torch.float32:
            few = pairs[:4]
            started = time.process_time()
            with_transformers(model, few, batch_size=4, use_cache=False, pad_to=512)
            rate = sum(len(pair.target_ids) for pair in few) / (time.process_time() - started)
            ours = [rates for engine, rates in found["engines"].items() if engine.startswith("ours")][-1]
            ours = ours["tokens_per_processor_second"]["median"]
            found["no_cache_padded_to_512"] = {"tokens_per_processor_second": rate, "prompts": len(few)}
            print(
                f"{name} {'no cache, padded to 512':<28} {rate:7.1f} tokens/s; "
                f"ours is x{ours / rate:.0f} ({len(few)} prompts, once)",
                flush=True,
            )
        found["free_running"] = compare_ids(model, pairs[: arguments.ids])
    few, many = (peak_memory(arguments, number) for number in (32, len(texts)))
    print(f"peak memory of a process: {few:.2f} GB for 32 questions, {many:.2f} GB for {len(texts)}")
    report["peak_memory_gb"] = {"32": few, str(len(texts)): many}
    write_results(arguments.out, "generation", report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", nargs="?")
    parser.add_argument("--model", type=Path, help="folder of the trained model; made where it does not exist")
    parser.add_argument("--train-s", type=float, default=480.0, help="processor-seconds")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--ids", type=int, default=64, help="questions whose ids are compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--memory", action="store_true", help="only print the peak memory of writing the texts")
    main(parser.parse_args())
