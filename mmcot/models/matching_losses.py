"""Masks and losses of BLIP-2's image-text matching (arXiv:2301.12597, section 3.2), as functions of one block.

    contrastive   which text belongs to a picture, by similarity (ITC)
    matching      whether a picture and a text belong together, against the most similar wrong ones (ITM)
    generation    the text of a picture, word for word; that is ``token_loss_sum`` of ``loss.py`` (ITG)

A pair is a row with a picture and a text; other rows have no part in any loss. Rows with the same text are positives
of each other and never negatives: of a data set with few different texts a block has many.

Shape suffixes: B rows of a block, K queries, T text positions, S = K + T, E width of the projections.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F  # noqa: N812 (the usual name)

SMOOTHING = 0.1  # of the contrastive targets, as in ALBEF and BLIP-2
PAIRS_OF_MATCHING = 3  # of a row: its own pair, a wrong picture, a wrong text


def apart_mask(num_queries: int, text_mask_BT: torch.Tensor) -> torch.Tensor:
    """Queries see queries, the text sees the text: the contrastive loss.

    Args:
        text_mask_BT: bool [B, T], False at padding.

    Returns:
        bool [B, S, S], False where a state (row) may not attend (column).
    """
    return _mask(num_queries, text_mask_BT, queries_see_text=False, text_sees_queries=False)


def causal_mask(num_queries: int, text_mask_BT: torch.Tensor) -> torch.Tensor:
    """Queries see queries, a text position all queries and the text up to itself: generation. As ``apart_mask``."""
    mask_BSS = _mask(num_queries, text_mask_BT, queries_see_text=False, text_sees_queries=True)
    is_query_S = torch.arange(mask_BSS.shape[1], device=mask_BSS.device) < num_queries
    return mask_BSS.tril() | (mask_BSS & is_query_S)  # queries see later queries too


def together_mask(num_queries: int, text_mask_BT: torch.Tensor) -> torch.Tensor:
    """All see all: the matching loss. As ``apart_mask``."""
    return _mask(num_queries, text_mask_BT, queries_see_text=True, text_sees_queries=True)


def _mask(
    num_queries: int, text_mask_BT: torch.Tensor, *, queries_see_text: bool, text_sees_queries: bool
) -> torch.Tensor:
    present_B1S = F.pad(text_mask_BT, (num_queries, 0), value=True)[:, None]
    is_text_S = torch.arange(present_B1S.shape[2], device=text_mask_BT.device) >= num_queries
    sees_SS = is_text_S[:, None] == is_text_S
    if queries_see_text:
        sees_SS = sees_SS | ~is_text_S[:, None]
    if text_sees_queries:
        sees_SS = sees_SS | is_text_S[:, None]
    return sees_SS & present_B1S


def similarities(queries_BKE: torch.Tensor, texts_CE: torch.Tensor) -> torch.Tensor:
    """The cosine of each picture's most similar query with each text, float32 [B, C]; all vectors have length 1."""
    return torch.einsum("bke,ce->bck", queries_BKE, texts_CE).amax(dim=-1)


def equal_texts(labels_BT: torch.Tensor) -> torch.Tensor:
    """Which rows have the same text, bool [B, B]."""
    return (labels_BT[:, None] == labels_BT).all(dim=-1)


def contrastive_loss_sum(scores_BB: torch.Tensor, equal_BB: torch.Tensor, is_pair_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the texts of a picture and of the pictures of a text, their mean, summed over pairs.

    The target of a row is shared equally by all pairs with its text; ``SMOOTHING`` of it is spread over all pairs.

    Differs from the reference: there the row itself is its only positive.

    Args:
        scores_BB: float32, picture (row) with text (column), divided by the temperature.
        equal_BB: see ``equal_texts``.
        is_pair_B: bool, False at rows without a picture or a text.

    Returns:
        float32 scalar; 0 with a gradient of 0 where there is no pair.
    """
    positive_BB = (equal_BB & is_pair_B).float()
    shared_BB = positive_BB / positive_BB.sum(dim=1, keepdim=True).clamp(min=1.0)
    spread_B = is_pair_B.float() / is_pair_B.sum().clamp(min=1)
    target_BB = (1.0 - SMOOTHING) * shared_BB + SMOOTHING * spread_B
    lowest = torch.finfo(torch.float32).min
    losses_B = torch.zeros_like(spread_B)
    for each_BB in (scores_BB, scores_BB.T):
        log_probabilities_BB = each_BB.masked_fill(~is_pair_B, lowest).log_softmax(dim=1)
        losses_B = losses_B - (target_BB * log_probabilities_BB.masked_fill(~is_pair_B, 0.0)).sum(dim=1) / 2
    return torch.where(is_pair_B, losses_B, 0.0).sum()


def draw_negatives(
    scores_BB: torch.Tensor, equal_BB: torch.Tensor, is_pair_B: torch.Tensor, *, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw a wrong picture for each text and a wrong text for each picture, similar ones more often.

    Row j is drawn with the probability softmax of the scores over all pairs whose text differs.

    Args:
        scores_BB: as for ``contrastive_loss_sum``.
        generator: None: torch's own, which a training seeds for every block.

    Returns:
        int64 [B] rows of the pictures, int64 [B] rows of the texts, bool [B] whether there is a wrong pair at all;
        where there is none, the rows mean nothing.
    """
    allowed_BB = ~equal_BB & is_pair_B & is_pair_B[:, None]

    def draw(each_BB: torch.Tensor) -> torch.Tensor:
        uniform_BB = torch.rand(each_BB.shape, device=each_BB.device, generator=generator)
        gumbel_BB = -(-uniform_BB.log()).log()  # the largest of scores with this noise is a draw from their softmax
        return (each_BB.detach() + gumbel_BB).masked_fill(~allowed_BB, float("-inf")).argmax(dim=1)

    return draw(scores_BB.T), draw(scores_BB), allowed_BB.any(dim=1)


def matching_loss_sum(logits_R2: torch.Tensor, is_pair_B: torch.Tensor, has_negative_B: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "belong together" over R = 3B pairs: own, wrong picture, wrong text; a third of each, summed.

    Args:
        logits_R2: float32 [3B, 2]; the second is that of "belong together".
        has_negative_B: bool, False where no wrong pair could be drawn: such a row has its own pair alone.
    """
    num_rows = len(is_pair_B)
    targets_R = torch.arange(len(logits_R2), device=logits_R2.device) < num_rows
    counts_R = torch.cat([is_pair_B, has_negative_B, has_negative_B])
    losses_R = F.cross_entropy(logits_R2, targets_R.long(), reduction="none")
    return (losses_R * counts_R).sum() / PAIRS_OF_MATCHING
