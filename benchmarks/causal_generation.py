"""Speed of text generation by causal language models, compared with transformers' own generate.

    OMP_NUM_THREADS=1 python benchmarks/causal_generation.py [--prompts 192] [--rounds 3] [--out DIR]

A Llama-like and a GPT-2-like model of some 30 M parameters with random weights continue prompts of 20 to 200 tokens
by 5 to 120 tokens, drawn with a seed. Both engines stop a row at its own length; transformers takes batches of 32 in
data order, padded on the left, and continues each until its longest row has ended. The ids of both are compared first.
Rounds alternate; printed are tokens a processor-second on one thread and the ratios round by round.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from pathlib import Path
from typing import Any, cast

import torch
from results import ratios, spread, summary, write_results
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mmcot.decoding.generation import generate_ids
from mmcot.models.causal import CausalLanguageModel

TOKENS: dict[str, Any] = {"vocab_size": 8000, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# The weights' standard deviations: with the usual 0.02 random models repeat a few tokens.
LLAMA_SPREAD, GPT2_SPREAD = 0.04, 0.06
RIVAL, OURS = "transformers", "ours"


def models() -> dict[str, PreTrainedModel]:
    """The models by name, with weights drawn with seed 0."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        **TOKENS,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=LLAMA_SPREAD,
    )
    gpt2 = GPT2Config(**TOKENS, n_embd=512, n_layer=8, n_head=8, initializer_range=GPT2_SPREAD)
    return {"Llama-like": LlamaForCausalLM(llama).eval(), "GPT-2-like": GPT2LMHeadModel(gpt2).eval()}


class OwnLengths(StoppingCriteria):
    """A row has ended when it has its own number of new tokens."""

    def __init__(self, lengths: list[int], num_prompt_tokens: int) -> None:
        self.lengths = torch.tensor(lengths) + num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Which rows have ended, bool [B]."""
        return input_ids.shape[1] >= self.lengths


def with_transformers(
    model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], *, batch_size: int
) -> list[list[int]]:
    """The new ids of each prompt, by ``generate`` in data order."""
    settings = copy.deepcopy(model.generation_config)
    settings.eos_token_id, settings.do_sample = None, False
    written = []
    for start in range(0, len(prompts), batch_size):
        chosen, own = prompts[start : start + batch_size], lengths[start : start + batch_size]
        width = max(map(len, chosen))
        settings.max_new_tokens = max(own)
        outputs = cast(Any, model).generate(
            input_ids=torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in chosen]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in chosen]),
            generation_config=settings,
            stopping_criteria=StoppingCriteriaList([OwnLengths(own, width)]),
        )
        written += [row[width : width + length] for row, length in zip(outputs.tolist(), own, strict=True)]
    return written


def with_ours(
    model: PreTrainedModel, prompts: list[list[int]], lengths: list[int], *, num_rows: int
) -> list[list[int]]:
    """The new ids of each prompt; the weights are packed anew in every call."""
    return generate_ids(
        CausalLanguageModel(model),
        prompts,
        [None] * len(prompts),
        feature_shape=(1, 1),
        max_new_tokens=lengths,
        num_rows=num_rows,
        eos_token_ids=(),
    )


def compare(model: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a processor-second of both, and how many texts are equal."""
    chance = random.Random(arguments.seed)
    prompts = [[chance.randrange(3, 8000) for _ in range(chance.randint(20, 200))] for _ in range(arguments.prompts)]
    lengths = [chance.randint(5, 120) for _ in prompts]
    engines = {
        RIVAL: lambda: with_transformers(model, prompts, lengths, batch_size=32),
        OURS: lambda: with_ours(model, prompts, lengths, num_rows=arguments.rows),
    }
    rates: dict[str, list[float]] = {engine: [] for engine in engines}
    texts: dict[str, list[list[int]]] = {}
    for _ in range(arguments.rounds):
        for engine, write in engines.items():
            started = time.process_time()
            texts[engine] = write()
            rates[engine].append(sum(lengths) / (time.process_time() - started))
    pairs = list(zip(texts[RIVAL], texts[OURS], strict=True))
    return {
        "parameters": model.num_parameters(),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": sum(lengths),
        "texts": len(prompts),
        "equal_texts": sum(theirs == ours for theirs, ours in pairs),
        "distinct_tokens": sum(len(set(ours)) for _, ours in pairs) / sum(lengths),
        "tokens_per_processor_second": {engine: summary(values) for engine, values in rates.items()},
        "ratio": ratios(rates[OURS], rates[RIVAL]),
    }


def main() -> None:
    """Print and store the numbers of every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    with torch.inference_mode():
        for name, model in models().items():
            report[name] = found = compare(model, arguments)
            for engine, rates in found["tokens_per_processor_second"].items():
                print(f"{name:<12} {engine:<14} {spread(rates, '.0f')} tokens a processor-second", flush=True)
            print(
                f"{name:<12} ratio {spread(found['ratio'])}; {found['equal_texts']} of {found['texts']} texts equal, "
                f"{found['distinct_tokens']:.0%} of a text's tokens are distinct, {found['parameters'] / 1e6:.1f} M",
                flush=True,
            )
    write_results(arguments.out, "causal_generation", report)


if __name__ == "__main__":
    main()
