"""Which layouts work: every rule that ties parallel.* to the model, the batch, the optimizer and the number of processes.

A layout that would train another model than one process does, or none, is refused before any process group exists.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kan_train.config.layout import Layout, layout_of
from kan_train.config.model import largest_divisor
from kan_train.config.repair import Fault, multiples, other_sizes, refusal
from kan_train.config.schema import yaml_value

if TYPE_CHECKING:
    from kan_train.config.run import Config

TENSOR, PIPELINE, CONTEXT = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.context_parallel"
EXPERT, EXPERT_TENSOR = "parallel.expert_parallel", "parallel.expert_tensor_parallel"
VIRTUAL, STAGE_LAYERS, SEQUENCE = "parallel.virtual_pipeline", "parallel.stage_layers", "parallel.sequence_parallel"
STAGE, LENGTH, BATCH, EVALUATE = "parallel.zero_stage", "model.sequence_length", "train.global_batch_size", "train.evaluate_every"


def check_layout(config: "Config", world_size: int) -> None:
    """Raise ConfigError on the first rule that `config` breaks with `world_size` processes, with the nearest settings that break none."""
    fault = next(_faults(config, world_size), None)
    if fault is not None:
        raise refusal(fault, config, world_size, _faults)


def broken_rule(config: "Config", world_size: int) -> str | None:
    """The first rule that `config` breaks with `world_size` processes; None where it breaks none. Searches ask so, and look for no repairs."""
    fault = next(_faults(config, world_size), None)
    return None if fault is None else fault.law


def broken_split(config: "Config", layout: Layout) -> str | None:
    """The first rule that splitting the parameters of config.model over `layout` breaks; None where it breaks none. Decoding asks so, which has no batch."""
    fault = next(_model(config, layout), None)
    return None if fault is None else fault.law


def _faults(config: "Config", world_size: int) -> Iterator[Fault]:
    # In this order: each rule may rely on those before it.
    yield from _settings(config, world_size)
    layout = layout_of(config, world_size)
    yield from _processes(config, layout)
    yield from _model(config, layout)
    yield from _tokens(config, layout)
    yield from _stages(config, layout)
    yield from _optimizer(config, layout)
    yield from _zero(config, layout)
    yield from _batch(config, layout)
    yield from _evaluation(config, layout)


def _settings(config: "Config", world_size: int) -> Iterator[Fault]:
    parallel = config.parallel
    tensor, expert_tensor = parallel.tensor_parallel, parallel.expert_tensor_parallel
    if not config.model.has_groves:
        dense = f"model.ffn={config.model.ffn}" if config.model.ffn != "kalmagrove" else "model.grove.num_groves=0"
        for setting, value in ((EXPERT, parallel.expert_parallel), (EXPERT_TENSOR, expert_tensor)):
            if value is not None and value > 1:
                yield Fault(f"{setting}={value} splits groves, but {dense} has none", [{setting: 1}])
    if expert_tensor not in (None, 1, tensor):
        law = f"{EXPERT_TENSOR}={expert_tensor} must be 1 (each grove whole on a rank) or {TENSOR}={tensor}"
        yield Fault(law, [{EXPERT_TENSOR: 1}, {EXPERT_TENSOR: tensor}])
    if parallel.sequence_parallel and tensor == 1:
        law = f"{SEQUENCE}=true splits tokens over tensor-parallel ranks, of which there is one"
        yield Fault(law, [{SEQUENCE: False}, *other_sizes(TENSOR, 1, world_size)])


def _processes(config: "Config", layout: Layout) -> Iterator[Fault]:
    dense = {TENSOR: layout.tensor_parallel, PIPELINE: layout.pipeline_parallel, CONTEXT: layout.context_parallel}
    grove = {EXPERT: layout.expert_parallel, EXPERT_TENSOR: layout.expert_tensor_parallel, PIPELINE: layout.pipeline_parallel}
    for sizes in (dense, grove):
        together = math.prod(sizes.values())
        if layout.world_size % together:
            named = {setting: size for setting, size in sizes.items() if size > 1}
            count = f" = {together}" if len(named) > 1 else ""
            law = f"{' * '.join(f'{setting}={size}' for setting, size in named.items())}{count} must divide the number of processes, {layout.world_size}"
            repairs = [repair for setting, size in named.items() for repair in other_sizes(setting, size, layout.world_size)]
            yield Fault(law, repairs, f"start {together} processes, or a multiple")


def _model(config: "Config", layout: Layout) -> Iterator[Fault]:
    model, tensor, world = config.model, layout.tensor_parallel, layout.world_size
    grove, edge = model.grove, model.grove.edge
    split = [("model.vocab_size", model.vocab_size, 128)]  # setting, value, what it must be a multiple of besides (0: other values do not serve)
    if model.attention_pattern != 1:
        split.append(("model.ada.num_heads", model.ada.num_heads, 0))
    if model.attention_pattern:
        split.append(("model.attention.num_heads", model.attention.num_heads, 0))
        split.append(("model.attention.num_kv_heads", model.attention.num_kv_heads, 0))
    if model.ffn == "swiglu":
        split.append(("model.ffn_width", model.ffn_width, 1))
    elif grove.shared_width:
        split.append(("model.grove.shared_width", grove.shared_width, 1))
    for setting, value, step in split:
        if value % tensor:
            repairs = [*other_sizes(TENSOR, tensor, world), *multiples(setting, value, math.lcm(step, tensor) if step else 0)]
            yield Fault(f"{setting}={value} must be a multiple of {TENSOR}={tensor}", repairs)
    if model.ffn == "swiglu":
        return
    if model.has_groves and grove.num_groves % layout.expert_parallel:
        law = f"model.grove.num_groves={grove.num_groves} must be a multiple of {EXPERT}={layout.expert_parallel}"
        yield Fault(law, other_sizes(EXPERT, layout.expert_parallel, world))
    if model.has_groves and grove.width % layout.expert_tensor_parallel:
        law = f"model.grove.width={grove.width} must be a multiple of {EXPERT_TENSOR}={layout.expert_tensor_parallel}"
        step = math.lcm(layout.expert_tensor_parallel, edge.group_size)
        yield Fault(law, [{EXPERT_TENSOR: 1}, *other_sizes(TENSOR, tensor, world), *multiples("model.grove.width", grove.width, step)])
    if edge.kind == "silu" or edge.sharing != "grouped":
        return
    hidden = [("model.grove.shared_width", grove.shared_width, TENSOR, tensor)] if grove.shared_width else []
    if model.has_groves:
        hidden.append(("model.grove.width", grove.width, EXPERT_TENSOR, layout.expert_tensor_parallel))
    for setting, width, by, ranks in hidden:
        functions = width // largest_divisor(width, edge.group_size)
        if functions % ranks:
            law = f"model.grove.edge.group_size={edge.group_size} gives {setting}={width} {functions} functions, not a multiple of {by}={ranks}"
            smaller = {"model.grove.edge.group_size": largest_divisor(width // ranks, edge.group_size)}
            yield Fault(law, [smaller, *([{EXPERT_TENSOR: 1}] if by == EXPERT_TENSOR else []), *other_sizes(TENSOR, tensor, world)])


def _tokens(config: "Config", layout: Layout) -> Iterator[Fault]:
    model, grove, world = config.model, config.model.grove, layout.world_size
    tensor, context, length = layout.tensor_parallel, layout.context_parallel, config.model.sequence_length
    splits_grove_tokens = model.has_groves and layout.splits_grove_tokens
    parts = context * (tensor if layout.sequence_parallel or splits_grove_tokens else 1)
    smaller = [*other_sizes(CONTEXT, context, world), *other_sizes(TENSOR, tensor, world)]
    if length % parts:
        over = f"{CONTEXT}={context}" + (f" times {TENSOR}={tensor}" if parts > context else "")
        why = "" if layout.sequence_parallel or parts == context else f" (each rank runs whole groves on its share of the tokens: {EXPERT_TENSOR}=1)"
        yield Fault(f"{LENGTH}={length} must be a multiple of {over}{why}", [*multiples(LENGTH, length, parts), *smaller, {SEQUENCE: False}])
    if context > 1 and model.attention_pattern != 1 and length // context < model.ada.conv_width - 1:
        law = f"model.ada.conv_width={model.ada.conv_width} reaches beyond the neighbour's {length // context} tokens "
        law += f"({LENGTH}={length} over {CONTEXT}={context})"
        least = math.ceil((model.ada.conv_width - 1) * context / parts) * parts
        yield Fault(law, [*other_sizes(CONTEXT, context, world), {"model.ada.conv_width": length // context + 1}, {LENGTH: least}])
    if not model.has_groves:
        return
    named = _named({EXPERT: layout.expert_parallel, CONTEXT: context, TENSOR: tensor if splits_grove_tokens else 1})
    if grove.capacity_factor and named:
        law = f"model.grove.capacity_factor={grove.capacity_factor} would count a grove's capacity over a part of the tokens with {named}"
        whole = [{EXPERT_TENSOR: tensor}] if splits_grove_tokens else []
        yield Fault(f"{law}: other tokens would be dropped than in one process", [{"model.grove.capacity_factor": 0.0}, *whole])


def _stages(config: "Config", layout: Layout) -> Iterator[Fault]:
    layers, given = config.model.num_layers, config.parallel.stage_layers
    pipeline, virtual = layout.pipeline_parallel, layout.virtual_pipeline
    chunks = pipeline * virtual
    if virtual > 1 and pipeline == 1:
        law = f"{VIRTUAL}={virtual} gives each pipeline stage several chunks of layers, but {PIPELINE}=1"
        yield Fault(law, [{VIRTUAL: 1}, *other_sizes(PIPELINE, 1, layout.world_size)])
    if chunks > layers:
        law = f"{PIPELINE}={pipeline} times {VIRTUAL}={virtual} makes {chunks} chunks of model.num_layers={layers} layers"
        fewer = [{VIRTUAL: layers // pipeline}] if layers >= pipeline and virtual > 1 else []
        yield Fault(law, [*fewer, *other_sizes(PIPELINE, pipeline, layout.world_size)])
    if given is not None and (len(given) != chunks or sum(given) != layers or min(given) < 1):
        shown = yaml_value(list(given))
        law = f"{STAGE_LAYERS}={shown} must be {chunks} numbers, one a chunk, each 1 or more, with the sum model.num_layers={layers}"
        even = [layers * (chunk + 1) // chunks - layers * chunk // chunks for chunk in range(chunks)]
        yield Fault(law, [{STAGE_LAYERS: even}, {STAGE_LAYERS: None}])


def _zero(config: "Config", layout: Layout) -> Iterator[Fault]:
    stage, pipeline, bf16 = layout.zero_stage, layout.pipeline_parallel, config.train.precision == "bf16"
    experts = config.model.has_groves and layout.groves_are_experts
    if config.parallel.offload_optimizer and not stage:
        yield Fault("parallel.offload_optimizer=true needs a sharded optimizer", [{STAGE: 2}, {STAGE: 1}, {STAGE: 3}])
    if stage == 0 and bf16:
        law = f"train.precision=bf16 with {STAGE}=0 would accumulate gradients in bf16"
        yield Fault(law, [{STAGE: 1}, {STAGE: 2}, {"train.precision": "fp32"}])
    if stage == 0 and experts:
        law = f"{STAGE}=0 clips by the norm of one rank's groves, which differ between the ranks ({EXPERT}={layout.expert_parallel}, "
        law += f"{EXPERT_TENSOR}={layout.expert_tensor_parallel} with {TENSOR}={layout.tensor_parallel})"
        yield Fault(law, [{STAGE: 1}, {STAGE: 2}, {EXPERT_TENSOR: layout.tensor_parallel}])
    if stage == 3 and config.model.has_groves and layout.expert_tensor_parallel > 1:
        law = f"{STAGE}=3 with {EXPERT_TENSOR}={layout.expert_tensor_parallel} gives a wrong gradient norm"
        yield Fault(law, [{EXPERT_TENSOR: 1}, {STAGE: 2}])
    if stage in (0, 3) and pipeline > 1:
        law = f"{STAGE}={stage} with {PIPELINE}={pipeline} "
        law += "gives a wrong gradient norm" if stage == 3 else "has no norm over the stages to clip by"
        yield Fault(law, [{STAGE: 2}, {STAGE: 1}, *other_sizes(PIPELINE, pipeline, layout.world_size)])
    if stage == 1 and pipeline > 1 and bf16:
        said = "unset, which is 1," if config.parallel.zero_stage is None else "1"
        law = f"{STAGE}={said} with {PIPELINE}={pipeline} and train.precision=bf16 cannot accumulate gradients in fp32"
        yield Fault(law, [{STAGE: 2}, {"train.precision": "fp32"}])


def _optimizer(config: "Config", layout: Layout) -> Iterator[Fault]:
    if config.optimizer.kind != "muon":
        return
    law, adamw = "optimizer.kind=muon orthogonalises whole matrices, which", {"optimizer.kind": "adamw"}
    split = {TENSOR: layout.tensor_parallel, EXPERT: layout.expert_parallel, PIPELINE: layout.pipeline_parallel}
    if named := _named(split):
        whole = {setting: 1 for setting, size in split.items() if size > 1}
        yield Fault(f"{law} {named} would cut or spread over ranks", [adamw, {**whole, STAGE: 0} if layout.zero_stage else whole])
    if layout.zero_stage:
        why = "ZeRO 1 to 3 cut into flat pieces: the result would differ from one process"
        yield Fault(f"{law} {why}", [{STAGE: 0}, adamw])


def _batch(config: "Config", layout: Layout) -> Iterator[Fault]:
    train, data, pipeline = config.train, layout.data_parallel, layout.pipeline_parallel
    share = train.micro_batch_size * data
    if train.global_batch_size % share:
        nearest = max(share, round(train.global_batch_size / share) * share)
        nearest = nearest if layout.virtual_pipeline == 1 else max(share * pipeline, round(nearest / share / pipeline) * share * pipeline)
        law = f"{BATCH}={train.global_batch_size} must be a multiple of train.micro_batch_size={train.micro_batch_size} times {data} data-parallel processes"
        yield Fault(law, [{BATCH: nearest}], "a smaller train.micro_batch_size")
    micro_batches = train.global_batch_size // share
    if layout.virtual_pipeline > 1 and micro_batches % pipeline:
        law = f"{VIRTUAL}={layout.virtual_pipeline} runs micro-batches in rounds of {PIPELINE}={pipeline}, but there are {micro_batches} in a step "
        law += f"({BATCH}={train.global_batch_size} / (train.micro_batch_size={train.micro_batch_size} * {data} data-parallel processes))"
        yield Fault(law, [*multiples(BATCH, train.global_batch_size, share * pipeline), {VIRTUAL: 1}])


def _evaluation(config: "Config", layout: Layout) -> Iterator[Fault]:
    every = config.train.evaluate_every
    if not every:
        return
    law = f"train.evaluate_every={every} reads questions with a model whose layers are all on one rank, which"
    if layout.pipeline_parallel > 1:
        yield Fault(f"{law} {PIPELINE}={layout.pipeline_parallel} spreads", [{PIPELINE: 1}, {EVALUATE: 0}])
    if layout.zero_stage == 3:
        yield Fault(f"{law} {STAGE}=3 cuts over the ranks", [{STAGE: 2}, {STAGE: 1}, {EVALUATE: 0}])


def _named(sizes: dict[str, int]) -> str:
    """The sizes above 1, as they are set; empty where there is none."""
    return " and ".join(f"{setting}={size}" for setting, size in sizes.items() if size > 1)
