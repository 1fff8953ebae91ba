"""How many micro-batches of which chunk a pipeline stage has under way, under Megatron's schedules (megatron.core.pipeline_parallel.schedules)."""

from collections.abc import Iterator

from kan_train.parallel.layout import Layout


def in_flight(layout: Layout, stage: int, micro_batches: int) -> Iterator[tuple[int, list[int], bool]]:
    """The fullest moments of a step of pipeline rank `stage`, each (chunk whose backward pass is next, micro-batches under way by chunk, whether an earlier
    micro-batch's gradients are there).

    Without a pipeline one micro-batch; under 1F1B as many as there are stages from this one on; interleaved, 2 (stages - stage - 1) more than the stages of
    all chunks but one, and the next.
    """
    stages, chunks = layout.pipeline_parallel, layout.virtual_pipeline
    if stages == 1:
        yield 0, [1], micro_batches > 1
        return
    if chunks == 1:
        most = min(stages - stage, micro_batches)
        yield 0, [most], micro_batches > most
        if micro_batches == most and most > 1:
            yield 0, [most - 1], True
        return
    yield from _interleaved(stages, chunks, stage, micro_batches)


def _interleaved(stages: int, chunks: int, stage: int, micro_batches: int) -> Iterator[tuple[int, list[int], bool]]:
    total = micro_batches * chunks
    warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)

    def chunk_of(number: int) -> int:
        return number % (stages * chunks) // stages

    counts, seen, done = [0] * chunks, set[tuple[int, tuple[int, ...], bool]](), 0
    backward_started = [False] * chunks
    period = stages * chunks
    for number in range(min(total, warm_up + 2 * period + 1)):
        counts[chunk_of(number)] += 1
        if number >= warm_up or number == total - 1:
            next_back = chunks - 1 - chunk_of(done)
            moment = (next_back, tuple(counts), all(backward_started))
            if moment not in seen:
                seen.add(moment)
                yield next_back, list(counts), all(backward_started)
            counts[next_back] -= 1
            backward_started[next_back] = True
            done += 1
