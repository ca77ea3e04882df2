"""How alike languages and layers are, from mean-pooled states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import normalize

# {"same", "other", "found"} of a language, see `against_english`.
Nearness = dict[str, float]


def against_english(states: Mapping[str, torch.Tensor]) -> dict[str, Nearness]:
    """How near each language is to English.

    Args:
        states: {lang: (N, D)}, whose row i has one meaning in all; English must be among them.

    Returns:
        {lang: {"same", "other", "found"}} without English. same: mean cosine with English of the same meaning; other:
        with English of every other meaning, what a high cosine is worth being compared with; found: per cent of texts
        to which English of the same meaning is the nearest.
    """
    english = normalize(states["en"], dim=-1)
    found = {}
    for lang, rows in states.items():
        if lang != "en":
            cosine = normalize(rows, dim=-1) @ english.T
            same, count = cosine.diagonal(), len(rows)
            nearest = (cosine.argmax(1) == torch.arange(count)).float()
            found[lang] = {
                "same": same.mean().item(),
                "other": ((cosine.sum() - same.sum()) / (count * (count - 1))).item(),
                "found": 100 * nearest.mean().item(),
            }
    return found


def by_layer(states: Mapping[str, torch.Tensor]) -> dict[str, dict[str, list[float]]]:
    """{lang: {"same", "other", "found": [a number a state]}} of {lang: (E, N, D)}."""
    layers = [against_english(dict(zip(states, layer, strict=True))) for layer in zip(*states.values(), strict=True)]
    return {
        lang: {name: [layer[lang][name] for layer in layers] for name in kinds} for lang, kinds in layers[0].items()
    }


def layer_similarity(states: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """(E, E): mean cosine between the states of two layers for the same text; states {lang: (E, N, D)}."""
    # Language by language: all of FLORES' 101 of a large encoder are 21 GB, of which two copies would be made.
    sums, count = [], 0
    for part in states.values():
        rows = normalize(part, dim=-1)
        sums.append(torch.einsum("ind,jnd->ij", rows, rows).double())
        count += rows.shape[1]
    return (torch.stack(sums).sum(0) / count).float()


def components(states: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The first two principal components of {lang: (N, D)}, the languages together.

    Returns:
        {"share": [2 shares of the variance], "points": {lang: [[x, y] a text]}}. An axis' sign is the one that makes
        its largest weight positive.
    """
    rows = torch.cat(list(states.values())).double()
    rows = rows - rows.mean(0)
    left, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    places = right[:2].abs().argmax(1, keepdim=True)
    points = left[:, :2] * sizes[:2] * right[:2].gather(1, places).sign().T
    counts = [len(part) for part in states.values()]
    return {
        "share": (sizes[:2] ** 2 / (sizes**2).sum()).tolist(),
        "points": {lang: found.tolist() for lang, found in zip(states, points.float().split(counts), strict=True)},
    }
