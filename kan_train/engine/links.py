"""How fast neighbouring nodes send to each other: every node with the next one, in a ring, rank by rank and in both directions at once.

The ranks of two nodes are paired in their order, so that every network card of a node has its part. Uses the group of all ranks and starts none.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from kan_train.config import StragglerConfig
from kan_train.parallel.runtime import Runtime

REPEATS = 3
"""Exchanges that are timed, after one that connects; the fastest counts."""

Pair = tuple[int, int]


def link_events(runtime: Runtime, hosts: Sequence[str], config: StragglerConfig, step: int) -> list[tuple[str, dict[str, Any]]]:
    """The events `links` and, for each slow one, `slow_link`; none where all ranks are on one host. Collective. hosts: of each rank."""
    rounds = ring_rounds(hosts)
    if not rounds:
        return []
    mine = [_exchange(runtime, _peer(pairs, runtime.rank), config.link_megabytes * 1_000_000) for pairs in rounds]
    seconds = runtime.gather(torch.tensor(mine, dtype=torch.float64, device=runtime.device)).tolist()
    links = []
    for number, pairs in enumerate(rounds):
        for first, second in pairs:
            slowest = max(seconds[first][number], seconds[second][number])
            rate = round(config.link_megabytes / 1000 / slowest, 4)
            links.append({"hosts": [hosts[first], hosts[second]], "ranks": [first, second], "gigabytes_per_second": rate})
    slow = slow_links(links, config.link_factor)
    report = {"step": step, "megabytes": config.link_megabytes, "links": links}
    return [("links", report), *(("slow_link", {"step": step, **link}) for link in slow)]


def slow_links(links: Sequence[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Those of which the fastest is more than `factor` times as fast, each with that `best` and a summary.

    The fastest and not the median is the measure: one bad card on one of three nodes makes two of three links slow.
    """
    best = max(link["gigabytes_per_second"] for link in links)
    found = []
    for link in links:
        rate, (first, second) = link["gigabytes_per_second"], link["ranks"]
        if rate * factor < best:
            between = f"{link['hosts'][0]} (rank {first}) and {link['hosts'][1]} (rank {second})"
            summary = f"the link between {between} is slow: {rate:.3g} GB/s in each direction, the fastest has {best:.3g} GB/s"
            found.append({**link, "best": best, "summary": summary})
    return found


def ring_rounds(hosts: Sequence[str]) -> list[list[Pair]]:
    """Pairs of ranks, round by round: every two neighbouring hosts of the ring meet once, and no host meets two others in a round."""
    members: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    nodes = list(members.values())
    count = len(nodes)
    if count < 2:
        return []
    neighbours = [(number, (number + 1) % count) for number in range(count if count > 2 else 1)]
    # Of an odd ring the last link has a neighbour in both of the other rounds.
    rounds: list[list[Pair]] = [[], [], []]
    for first, second in neighbours:
        number = 2 if count % 2 and first == count - 1 else first % 2
        rounds[number] += zip(nodes[first], nodes[second], strict=False)
    return [pairs for pairs in rounds if pairs]


def _peer(pairs: Sequence[Pair], rank: int) -> int | None:
    return next((second if rank == first else first for first, second in pairs if rank in (first, second)), None)


def _exchange(runtime: Runtime, peer: int | None, size: int) -> float:
    """Seconds in which this rank sent `size` bytes to `peer` and got as many; 0 without one. Every rank calls it."""
    sent = torch.zeros(size if peer is not None else 0, dtype=torch.uint8, device=runtime.device)
    received, seconds = torch.empty_like(sent), []
    for _ in range(1 + REPEATS):
        runtime.barrier()
        runtime.synchronise()
        started = time.perf_counter()
        if peer is not None:
            # As one batch: NCCL then uses the communicator of all ranks, instead of making one for the pair.
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
                work.wait()
        runtime.synchronise()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:]) if peer is not None else 0.0
