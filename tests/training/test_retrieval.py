"""Retrieval over a whole split: what counts as right, and what is left out."""

from __future__ import annotations

import types

import pytest
import torch

from launcher.stages.samples import Block
from launcher.training import retrieval

IGNORED = -100


class Engine:
    """Finds the vectors of a picture and a text by their first value and first token."""

    device = torch.device("cpu")

    def __init__(self, pictures, texts):
        self.pictures, self.texts = pictures, texts

    def eval(self):
        pass

    def __call__(self, vision_features, vision_mask, paired_labels, only_embeds):
        assert only_embeds
        return (
            torch.stack([self.pictures[int(row[0, 0])] for row in vision_features]),
            torch.stack([self.texts[max(int(row[0]), 0)] for row in paired_labels]),
        )


def block(pictures, labels, *, absent=()):
    features = torch.zeros(len(pictures), 2, 3)
    features[:, 0, 0] = torch.tensor(pictures)
    mask = torch.ones(len(pictures), 2, dtype=torch.bool)
    mask[list(absent)] = False
    tensors = {"labels": torch.tensor(labels), "vision_features": features, "vision_mask": mask}
    return 0, Block(tensors, tuple("abcdef"[: len(pictures)]))


def measure(monkeypatch, *blocks):
    axes = torch.eye(4)
    two_queries = {1: axes[[0, 0]], 2: axes[[1, 1]] * torch.tensor([[-1.0], [1.0]]), 3: axes[[0, 0]], 4: axes[[2, 2]]}
    engine = Engine(two_queries, {0: axes[0], 1: axes[0], 5: axes[0], 6: axes[1], 7: axes[2], 8: axes[3]})
    monkeypatch.setattr(retrieval, "gather_rows", lambda rows: rows)
    monkeypatch.setattr(retrieval, "host_sum", lambda values: values)
    stream = types.SimpleNamespace(steps=lambda **options: [types.SimpleNamespace(blocks=list(blocks))])
    guard = types.SimpleNamespace(progress=lambda: None)
    return retrieval.measure_retrieval(engine, stream, 1, rank=0, world_size=1, hang_guard=guard)


def test_a_picture_is_right_where_its_best_text_of_the_whole_split_is_equal_to_its_own(monkeypatch):
    # The same text, once padded; picture 4 is most similar to the text of the other block, and wrong.
    first = block([1, 2], [[5, 1, IGNORED], [6, 8, 1]])
    second = block([3, 4], [[5, 1], [8, 1]])
    third = block([1], [[7, 1]])
    found = measure(monkeypatch, first, second, third)
    assert found == {"retrieval_at_1": pytest.approx(3 / 5), "retrieval_texts": 4.0}


def test_rows_without_a_picture_or_a_text_and_dummy_blocks_are_left_out(monkeypatch):
    lacking = block([1, 2, 2], [[5, 1], [6, 1], [1, IGNORED]], absent=[1])
    dummy = block([2], [[IGNORED, IGNORED]])
    assert measure(monkeypatch, lacking, dummy) == {"retrieval_at_1": 1.0, "retrieval_texts": 1.0}
