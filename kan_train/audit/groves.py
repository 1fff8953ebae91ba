"""Which tokens go where: load, mutual information of groves and what tokens are, and each grove's typical tokens.  T tokens, K choices, N groves."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from kan_train.audit.importance import runs_of
from kan_train.audit.watch import Watched
from kan_train.data_tools.tokenizer import Tokenizer

BYTE_CLASSES = ("document start", "line break", "spaces", "space + letters", "letters", "digits", "punctuation", "not ASCII", "mixed")
SHUFFLES = 10
_SHOWN = {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5"}
TYPICAL = 6
"""Tokens that are named for a grove."""


def groves_of(watched: Watched, tokenizer: Tokenizer, groves: int, *, seed: int) -> list[dict[str, Any]]:
    """For every layer: shares of the load [N], its coefficient of variation, unused groves, mutual information, byte classes by grove, typical tokens."""
    kinds, of_token = np.unique(watched.tokens, return_inverse=True)
    texts = [text_of(tokenizer, token) for token in kinds.tolist()]
    classes = np.array([BYTE_CLASSES.index(byte_class(tokenizer, token)) for token in kinds.tolist()])[of_token]
    labels = {"token": of_token, "byte class": classes, "document": watched.documents}
    found = []
    for layer, choices in zip(watched.layers, watched.choices, strict=True):
        runs = runs_of(choices, groves)
        load = runs / max(runs.sum(), 1e-300)  # under a capacity fewer than K groves run a token
        information = {name: mutual_information(choices, label, groves, seed=seed) for name, label in labels.items()}
        found.append({
            "layer": layer, "load": load.tolist(), "load_cv": float(load.std() / max(load.mean(), 1e-300)), "unused": np.flatnonzero(load == 0).tolist(),
            "load_bits": _entropy(load), "dropped": float((choices < 0).mean()), "mutual_information": information,
            "byte_classes": counts_of(choices, classes, groves, len(BYTE_CLASSES)).tolist(),
            "typical": _typical(counts_of(choices, of_token, groves, len(kinds)), texts),
        })  # fmt: skip
    return found


def counts_of(choices_TK: np.ndarray, label_T: np.ndarray, groves: int, labels: int) -> np.ndarray:
    """How many choices of a grove were of a token with each label: int64 [N, labels]."""
    label_TK = np.broadcast_to(label_T[:, None], choices_TK.shape)
    real = choices_TK >= 0
    flat = choices_TK[real].astype(np.int64) * labels + label_TK[real]
    return np.bincount(flat, minlength=groves * labels).reshape(groves, labels)


def mutual_information(choices_TK: np.ndarray, label_T: np.ndarray, groves: int, *, seed: int, shuffles: int = SHUFFLES) -> dict[str, Any]:
    """I(grove; label) of a choice, in bits, with what a finite sample alone would show.

    bits: the plug-in estimate, which is too high (it is positive for independent ones too). chance: its mean over `shuffles` random assignments of the
    labels to the tokens, a token's K choices kept together; chance_deviation: its deviation. excess = bits - chance, and share: of the groves' entropy.
    first_order: the bias (X - 1)(Y - 1) / (2 n ln 2) of independent choices (Miller, 1955), for comparison: too high where most pairs are rare.
    """
    labels = int(label_T.max()) + 1
    table = counts_of(choices_TK, label_T, groves, labels)
    generator = np.random.default_rng(seed)
    shuffled = [plug_in(counts_of(choices_TK, generator.permutation(label_T), groves, labels)) for _ in range(shuffles)]
    bits, chance, total = plug_in(table), float(np.mean(shuffled)), int(table.sum())
    used, seen = np.count_nonzero(table.sum(1)), np.count_nonzero(table.sum(0))
    entropy = _entropy(table.sum(1) / max(1, total))
    return {
        "bits": bits, "chance": chance, "chance_deviation": float(np.std(shuffled, ddof=1)), "excess": bits - chance,
        "share": (bits - chance) / entropy if entropy else 0.0, "labels": int(seen), "choices": total,
        "first_order": (used - 1) * (seen - 1) / (2 * total * math.log(2)) if total else 0.0,
    }  # fmt: skip


def plug_in(table: np.ndarray) -> float:
    """Mutual information in bits of the joint distribution that counts [X, Y] are proportional to."""
    joint = table / max(1, table.sum())
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / independent[there])).sum())


def byte_class(tokenizer: Tokenizer, token: int) -> str:
    """One of BYTE_CLASSES: what the bytes of a token are."""
    if token == tokenizer.boundary:
        return "document start"
    byte = tokenizer.byte_of(token) if token < tokenizer.vocab_size else None
    text = tokenizer.decode([token]) if byte is None else chr(byte)
    if not text:
        return "mixed"
    if not text.isascii():
        return "not ASCII"
    if text.isspace():
        return "line break" if "\n" in text else "spaces"
    body = text.lstrip(" ")
    if body.isalpha():
        return "letters" if body == text else "space + letters"
    if body.isdigit():
        return "digits"
    return "punctuation" if body.isprintable() and not any(letter.isalnum() or letter.isspace() for letter in body) else "mixed"


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """A token for people: its text, with spaces and line breaks shown."""
    if token == tokenizer.boundary:
        return "<document>"
    byte = tokenizer.byte_of(token) if token < tokenizer.vocab_size else None
    if byte is not None:
        return _SHOWN.get(chr(byte), f"<{byte:02X}>")
    return "".join(_SHOWN.get(letter, letter) for letter in tokenizer.decode([token])) or f"<{token}>"


def _typical(table: np.ndarray, texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """The tokens that a grove has most too many of: by p(token | grove) log2(p(token | grove) / p(token)), its part of what tells the grove from the rest."""
    overall = table.sum(0) / max(1, table.sum())
    found = []
    for counts in table:
        share = counts / max(1, counts.sum())
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.where(counts > 0, share * np.log2(share / overall), 0.0)
        best = [number for number in np.argsort(-part, kind="stable")[:TYPICAL].tolist() if part[number] > 0]
        found.append([
            {"token": texts[number], "count": int(counts[number]), "of_grove": float(share[number]), "lift": float(share[number] / overall[number])}
            for number in best
        ])  # fmt: skip
    return found


def _entropy(shares: np.ndarray) -> float:
    there = shares[shares > 0]
    return float(-(there * np.log2(there)).sum())
