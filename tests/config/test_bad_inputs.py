"""The table of bad settings: each is refused by name, and the value that its error suggests works when it is put in."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest

from kan_train.config import ConfigError, GenerateConfig, PrepareConfig
from kan_train.config.compose import compose_settings, compose_train

COMMANDS = {"train": compose_train, "prepare": partial(compose_settings, PrepareConfig), "generate": partial(compose_settings, GenerateConfig)}


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Overrides of which the first is at fault, the setting that the error names, and the override that it suggests."""

    given: list[str]
    names: str
    suggests: str
    keep: bool = False  # whether the first override stays when the suggestion, of another setting, is put in
    command: str = "train"
    world_size: int = 1
    also: list[str] = field(default_factory=list)  # what the error says besides

    def repaired(self) -> Iterator[list[str]]:
        """Overrides with the suggestion put in; `a=1 or 2` is two suggestions, `a=1 b=2` one of two settings."""
        first, *others = self.suggests.split(" or ")
        kept = self.given if self.keep else self.given[1:]
        for suggestion in (first.split(" "), *([f"{key(first)}={other}"] for other in others)):
            settings = {key(override) for override in suggestion}
            yield [*(one for one in kept if key(one) not in settings), *suggestion]


def key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def bad(*given: str, names: str, suggests: str, **more) -> pytest.param:  # type: ignore[no-untyped-def, valid-type]
    return pytest.param(Bad(given=list(given), names=names, suggests=suggests, **more), id=" ".join(given) or more["command"])


UNKNOWN_NAMES = [
    bad("model=kan_tin", names="model=kan_tin", suggests="model=kan_tiny", also=["kan_340b", "dense_1b_total"]),
    bad("model=kan_1B", names="model=kan_1B", suggests="model=kan_1b"),
    bad("model=zebra", names="model=zebra", suggests="model=kan_tiny"),
    bad("model=null", names="model=null", suggests="model=kan_tiny"),
    bad("~model", names="~model", suggests="model=kan_tiny"),
    bad("+parallel=zero2", names="+parallel=zero2", suggests="parallel=zero2"),
    bad("modle=kan_1b", names="modle", suggests="model=kan_1b"),
    bad("parallel=zero4", names="parallel=zero4", suggests="parallel=zero3"),
    bad("optimizer@model=muon", names="optimizer@model", suggests="optimizer=muon"),
    bad("train.step=50", names="train.step", suggests="train.steps=50"),
    bad("train.micro_batch=4", names="train.micro_batch", suggests="train.micro_batch_size=4"),
    bad("model.grove.num_grove=64", names="model.grove.num_grove", suggests="model.grove.num_groves=64"),
    bad("num_groves=64", names="num_groves", suggests="model.grove.num_groves=64"),
    bad("model.num_groves=64", names="model.num_groves", suggests="model.grove.num_groves=64"),
    bad("learning_rate=1e-3", names="learning_rate", suggests="optimizer.learning_rate=1e-3"),
    bad("+trian.steps=50", names="trian.steps", suggests="train.steps=50"),
    bad("train.steps.total=50", names="train.steps.total", suggests="train.steps=50"),
    bad("+train.steps=50", names="+train.steps", suggests="train.steps=50"),
    bad("~train.steps", names="~train.steps", suggests="train.steps=300"),
    bad("data.blend.mine=2", names="data.blend.mine", suggests="+data.blend.mine=1.0"),
    bad("run.name=${modle.name}", names="run.name", suggests="run.name=${model.name}"),
    bad("corpus=directry", "corpus.path=x", names="corpus=directry", suggests="corpus=directory", command="prepare"),
    bad("temprature=1", "run=x", names="temprature", suggests="temperature=1", command="generate"),
]

WRONG_TYPES = [
    bad("train.steps=many", names="train.steps=many", suggests="train.steps=300", also=["a whole number"]),
    bad("train.steps=1e3", names="train.steps=1000.0", suggests="train.steps=1000"),
    bad("train.steps=100.7", names="train.steps=100.7", suggests="train.steps=101"),
    bad("train.steps=true", names="train.steps", suggests="train.steps=300"),
    bad("train.steps=null", names="train.steps", suggests="train.steps=300"),
    bad("train.steps=???", names="train.steps", suggests="train.steps=300", also=["must be given"]),
    bad("train.steps=[50,60]", names="train.steps", suggests="train.steps=300"),
    bad("train.steps=50,60", names="train.steps=50,60", suggests="train.steps=50", also=["several values"]),
    bad("train.steps=${oc.env:KAN_NO_SUCH}", names="train.steps", suggests="train.steps=300", also=["KAN_NO_SUCH"]),
    bad("optimizer.learning_rate=fast", names="optimizer.learning_rate=fast", suggests="optimizer.learning_rate=0.006", also=["a number"]),
    bad("optimizer.learning_rate=nan", names="optimizer.learning_rate=nan", suggests="optimizer.learning_rate=0.006"),
    bad("cluster.peak_tflops=inf", names="cluster.peak_tflops=inf", suggests="cluster.peak_tflops=1.0"),
    bad("checkpoint.retries=-1", names="checkpoint.retries", suggests="checkpoint.retries=0"),
    bad("checkpoint.keep_best=-2", names="checkpoint.keep_best", suggests="checkpoint.keep_best=0"),
    bad("recovery.max_bad_steps=0", names="recovery.max_bad_steps", suggests="recovery.max_bad_steps=1"),
    bad("recovery.window=3", names="recovery.window", suggests="recovery.window=10"),
    bad("recovery.spike=-1", names="recovery.spike", suggests="recovery.spike=0"),
    bad("recovery.hang_minutes=20", names="recovery.hang_minutes", suggests="recovery.hang_minutes=8", also=["parallel.timeout_minutes=10"]),
    bad("parallel.timeout_minutes=5", names="recovery.hang_minutes", suggests="recovery.hang_minutes=4", keep=True),
    bad("checkpoint.resume=maybe", names="checkpoint.resume=maybe", suggests="checkpoint.resume=true", also=["true or false"]),
    bad("parallel.zero_stage=two", names="parallel.zero_stage=two", suggests="parallel.zero_stage=1", also=["or null"]),
    bad("data.blend.stdlib=much", names="data.blend.stdlib=much", suggests="data.blend.stdlib=1.0"),
    bad("data.blend=stdlib", names="data.blend", suggests="+data.blend.NAME=1.0"),
    bad(names="run", suggests="run=NAME", command="generate", also=["must be given"]),
]

MODELS = [
    bad("model.grove.active_groves=33", names="model.grove.active_groves=33", suggests="model.grove.active_groves=2"),
    bad("model.grove.active_groves=0", names="model.grove.active_groves=0", suggests="model.grove.active_groves=2"),
    bad("model.ada.num_heads=5", names="model.ada.num_heads=5", suggests="model.ada.num_heads=4", also=["model.width=128"]),
    bad("model.attention.num_heads=3", "model=dense_tiny_total", "model.attention.num_kv_heads=1",
        names="model.attention.num_heads=3", suggests="model.attention.num_heads=2"),
    bad("model.attention.num_kv_heads=3", "model=dense_tiny_total",
        names="model.attention.num_kv_heads=3", suggests="model.attention.num_kv_heads=2"),
    bad("model.attention.num_heads=128", "model=dense_tiny_total",
        names="model.attention.num_heads=128", suggests="model.attention.num_heads=64"),
    bad("model.vocab_size=4100", names="model.vocab_size=4100", suggests="model.vocab_size=4224", also=["multiple of 128"]),
    bad("model.num_layers=0", names="model.num_layers=0", suggests="model.num_layers=1"),
    bad("model.ffn=dense", names="model.ffn='dense'", suggests="model.ffn=swiglu", also=["kalmagrove"]),
    bad("model.grove.gate=sigmoid", "model.grove.active_groves=1",
        names="model.grove.gate=sigmoid", suggests="model.grove.active_groves=2", keep=True),
    bad("model.grove.kind=edge", "model.grove.edge.sharing=per_edge", "model.grove.score=linear",
        names="model.grove.kind=edge", suggests="model.grove.score=norm", keep=True),
    bad("model.grove.gate=literal", "model.grove.score=linear", names="model.grove.gate=literal", suggests="model.grove.gate=softmax"),
    bad("model.grove.kind=edge", names="model.grove.kind=edge", suggests="model.grove.edge.sharing=per_edge", keep=True),
    bad("model.grove.kind=edge", "model=kan_literal", "model.grove.edge.kind=silu",
        names="model.grove.kind=edge", suggests="model.grove.edge.kind=bspline", keep=True),
    bad("model.grove.edge.sharing=per_edge", names="model.grove.kind=gated", suggests="model.grove.edge.sharing=grouped"),
    bad("model.grove.edge.group_size=50", names="model.grove.edge.group_size=50", suggests="model.grove.edge.group_size=48"),
    bad("model.grove.edge.order=4", names="model.grove.edge.order=4", suggests="model.grove.edge.order=3"),
    bad("model.grove.edge.kind=bsplin", names="model.grove.edge.kind='bsplin'", suggests="model.grove.edge.kind=bspline"),
    bad("model.grove.edge.high=-4", names="model.grove.edge.high=-4.0", suggests="model.grove.edge.high=3"),
    bad("model.ada.half_life_max=2", names="model.ada.half_life_max=2.0", suggests="model.ada.half_life_max=64"),
    bad("model.ada.half_life_middle=0.5", names="model.ada.half_life_middle=0.5", suggests="model.ada.half_life_middle=16.0"),
    bad("model.ada.decay=learnt", names="model.ada.decay='learnt'", suggests="model.ada.decay=learned"),
]  # fmt: skip

RUNS = [
    bad("train.global_batch_size=12", "train.micro_batch_size=8", names="train.global_batch_size=12", suggests="train.global_batch_size=16"),
    bad("train.global_batch_size=24", "train.micro_batch_size=8",
        names="train.global_batch_size=24", suggests="train.global_batch_size=32", world_size=4),
    bad("train.global_batch_size=7", names="train.global_batch_size=7", suggests="train.global_batch_size=6", world_size=3),
    bad("train.micro_batch_size=-1", names="train.micro_batch_size=-1", suggests="train.micro_batch_size=0"),
    bad("train.steps=-1", "optimizer.schedule.warmup_steps=0", names="train.steps=-1", suggests="train.steps=1", also=["or more"]),
    bad("train.precision=fp16", names="train.precision='fp16'", suggests="train.precision=bf16"),
    bad("optimizer.schedule.warmup_steps=300", names="optimizer.schedule.warmup_steps=300", suggests="optimizer.schedule.warmup_steps=30"),
    bad("optimizer.schedule.kind=linear", names="optimizer.schedule.kind='linear'", suggests="optimizer.schedule.kind=cosine"),
    bad("optimizer.schedule.final_fraction=2",
        names="optimizer.schedule.final_fraction=2.0", suggests="optimizer.schedule.final_fraction=1.0"),
    bad("optimizer.beta2=1", names="optimizer.beta2=1.0", suggests="optimizer.beta2=0.95"),
    bad("optimizer.learning_rate=0", names="optimizer.learning_rate=0.0", suggests="optimizer.learning_rate=0.006"),
    bad("parallel.zero_stage=2", "optimizer=muon",
        names="optimizer.kind=muon", suggests="parallel.zero_stage=0", also=["optimizer.kind=adamw"]),
    bad("optimizer=muon", "train.micro_batch_size=4",
        names="optimizer.kind=muon", suggests="parallel.zero_stage=0", keep=True, world_size=2),
    bad("parallel.offload_optimizer=true", names="parallel.offload_optimizer=true", suggests="parallel.zero_stage=2", keep=True),
    bad("parallel.zero_stage=4", names="parallel.zero_stage=4", suggests="parallel.zero_stage=3"),
    bad("parallel.zero_stage=0", "train.precision=bf16", names="train.precision=bf16", suggests="parallel.zero_stage=1"),
    bad("init_from=runs/a", "branch_from=runs/b", names="init_from=runs/a", suggests="branch_from=null", keep=True),
    bad("run.name=a/b", names="run.name='a/b'", suggests="run.name=first"),
    bad("run.device=gpu", names="run.device='gpu'", suggests="run.device=cpu", also=["cuda"]),
    bad("logging.wandb=on", names="logging.wandb='on'", suggests="logging.wandb=online"),
    bad("cluster.peak_tflops=-1", names="cluster.peak_tflops=-1.0", suggests="cluster.peak_tflops=null"),
    bad("data.blend.stdlib=0", names="data.blend.stdlib=0.0", suggests="data.blend.stdlib=1.0"),
    bad("~data.blend.stdlib", names="data.blend", suggests="+data.blend.NAME=1.0", keep=True),
    bad("corpus=directory", names="corpus=directory", suggests="corpus.path=/path/to/texts", keep=True, command="prepare"),
    bad("corpus=huggingface", names="corpus=huggingface", suggests="corpus.dataset=HuggingFaceFW/fineweb", keep=True, command="prepare"),
    bad("heldout=0.9", names="heldout=0.9", suggests="heldout=0.5", command="prepare"),
    bad("compression=gzip", names="compression='gzip'", suggests="compression=zstd", command="prepare"),
    bad("tokenizer.vocab_size=100", names="tokenizer.vocab_size=100", suggests="tokenizer.vocab_size=300", command="prepare"),
    bad("top_p=0", "run=x", names="top_p=0.0", suggests="top_p=0.95", command="generate"),
    bad("temperature=-1", "run=x", names="temperature=-1.0", suggests="temperature=0.0", command="generate"),
]  # fmt: skip


# A batch for any number of processes below: a layout is then right or wrong by itself.
SMALL = ["train.micro_batch_size=1", "train.global_batch_size=24"]
DENSE = ["model=dense_tiny_total", "model.ffn_width=6288"]


def layout(world_size: int, fault: str, *given: str, names: str, suggests: str, **more) -> pytest.param:  # type: ignore[no-untyped-def, valid-type]
    return bad(fault, *SMALL, *given, names=names, suggests=suggests, world_size=world_size, **more)


TP, PP, VPP, CP = "parallel.tensor_parallel", "parallel.pipeline_parallel", "parallel.virtual_pipeline", "parallel.context_parallel"
EP, ETP, ZERO, STAGES = "parallel.expert_parallel", "parallel.expert_tensor_parallel", "parallel.zero_stage", "parallel.stage_layers"

LAYOUTS = [
    # sizes and processes
    *(layout(2, f"{one}=0", names=f"{one}=0", suggests=f"{one}=1") for one in (TP, PP, VPP, CP, EP, ETP)),
    layout(4, f"{TP}=3", names=f"{TP}=3", suggests=f"{TP}=4 or 2", also=["processes, 4", "start 3 processes"]),
    layout(1, f"{TP}=2", names=f"{TP}=2", suggests=f"{TP}=1", also=["start 2 processes"]),
    layout(4, f"{CP}=4", f"{TP}=2", names=f"{TP}=2 * {CP}=4 = 8", suggests=f"{CP}=2 or 1"),
    layout(4, f"{PP}=4", f"{TP}=4", f"{ZERO}=1", names=f"{TP}=4 * {PP}=4 = 16", suggests=f"{PP}=1"),
    layout(4, f"{EP}=3", names=f"{EP}=3", suggests=f"{EP}=4 or 2"),
    layout(4, f"{EP}=4", f"{PP}=2", names=f"{EP}=4 * {PP}=2 = 8", suggests=f"{EP}=2 or 1"),
    layout(4, f"{EP}=4", f"{TP}=2", f"{ETP}=2", names=f"{EP}=4 * {ETP}=2 = 8", suggests=f"{EP}=2 or 1", also=[f"{ETP}=1"]),
    layout(6, f"{TP}=6", names=f"model.vocab_size=4096 must be a multiple of {TP}=6", suggests=f"{TP}=2 or 1"),
    # no one setting mends these: the nearest layout is named
    layout(2, f"{TP}=3", f"{CP}=3", "train.global_batch_size=1", names=f"{TP}=3 * {CP}=3 = 9", suggests=f"{TP}=2 {CP}=1", keep=True),
    layout(2, f"{PP}=4", f"{STAGES}=[1,1,1,1]", names=f"{PP}=4", suggests=f"{PP}=2 {STAGES}=[2,2]", keep=True),
    # the model
    layout(8, f"{TP}=8", names=f"model.ada.num_heads=4 must be a multiple of {TP}=8", suggests=f"{TP}=4 or 2"),
    layout(8, f"{TP}=8", *DENSE, names="model.attention.num_heads=4", suggests=f"{TP}=4 or 2"),
    layout(4, f"{TP}=4", *DENSE, "model.attention.num_kv_heads=2", names="model.attention.num_kv_heads=2", suggests=f"{TP}=2 or 1"),
    layout(6, f"{TP}=3", "model.width=96", "model.ada.num_heads=6", "model.sequence_length=513", names="model.vocab_size=4096",
           suggests="model.vocab_size=4224", also=[f"{TP}=1"], keep=True),
    layout(4, f"{TP}=4", *DENSE, "model.ffn_width=6290", names="model.ffn_width=6290", suggests=f"{TP}=2 or 1"),
    layout(4, f"{TP}=4", "model.grove.shared_width=66", names="model.grove.shared_width=66", suggests=f"{TP}=2"),
    layout(4, f"{TP}=4", "model.grove.shared_width=32", names="shared_width=32 2 functions", suggests="model.grove.edge.group_size=8"),
    layout(4, f"{EP}=4", "model.grove.num_groves=30", names="model.grove.num_groves=30", suggests=f"{EP}=2 or 1"),
    layout(4, f"{ETP}=4", f"{TP}=4", "model.grove.width=18", "model.grove.edge.group_size=3",
           names=f"model.grove.width=18 must be a multiple of {ETP}=4", suggests=f"{ETP}=1"),
    layout(4, f"{ETP}=4", f"{TP}=4", "model.grove.width=96",
           names=f"model.grove.width=96 6 functions, not a multiple of {ETP}=4", suggests="model.grove.edge.group_size=12", keep=True),
    layout(2, f"{EP}=2", *DENSE, names=f"{EP}=2 splits groves", suggests=f"{EP}=1"),
    layout(2, f"{ETP}=2", f"{TP}=2", *DENSE, names=f"{ETP}=2 splits groves", suggests=f"{ETP}=1"),
    layout(4, f"{ETP}=2", f"{TP}=4", names=f"{ETP}=2", suggests=f"{ETP}=1 or 4"),
    # tokens
    layout(3, f"{CP}=3", names=f"model.sequence_length=512 must be a multiple of {CP}=3",
           suggests="model.sequence_length=513", keep=True),
    layout(4, f"{TP}=2", f"{CP}=2", "model.sequence_length=510",
           names=f"model.sequence_length=510 must be a multiple of {CP}=2 times {TP}=2", suggests=f"{TP}=1"),
    layout(2, "model.sequence_length=511", f"{TP}=2", "parallel.sequence_parallel=false",
           names="model.sequence_length=511", suggests="model.sequence_length=512", also=[f"{ETP}=1"]),
    layout(2, "model.sequence_length=511", f"{TP}=2", *DENSE, names="model.sequence_length=511", suggests="parallel.sequence_parallel=false",
           keep=True),
    layout(4, f"{CP}=4", "model.sequence_length=8", "model.ada.conv_width=5", names="model.ada.conv_width=5 reaches", suggests=f"{CP}=2 or 1"),
    layout(2, "parallel.sequence_parallel=true", names="parallel.sequence_parallel=true", suggests="parallel.sequence_parallel=false"),
    *(layout(2, "model.grove.capacity_factor=2", f"{one}=2", names="model.grove.capacity_factor=2.0", suggests="model.grove.capacity_factor=0.0",
             also=[f"{one}=2"]) for one in (EP, CP, TP)),
    layout(2, "model.grove.capacity_factor=2", f"{TP}=2", names="model.grove.capacity_factor=2.0", suggests=f"{ETP}=2", keep=True),
    # pipeline
    layout(2, f"{VPP}=2", names=f"{VPP}=2", suggests=f"{VPP}=1", also=[f"{PP}=2"]),
    layout(8, f"{PP}=8", names=f"{PP}=8 times {VPP}=1 makes 8 chunks of model.num_layers=4", suggests=f"{PP}=4 or 2"),
    layout(2, f"{VPP}=4", f"{PP}=2", names=f"{PP}=2 times {VPP}=4 makes 8 chunks", suggests=f"{VPP}=2"),
    layout(2, f"{STAGES}=[4]", f"{PP}=2", names=f"{STAGES}=[4]", suggests=f"{STAGES}=[2,2]"),
    layout(2, f"{STAGES}=[1,2]", f"{PP}=2", names=f"{STAGES}=[1,2]", suggests=f"{STAGES}=[2,2]", also=["or null"]),
    layout(2, f"{STAGES}=[0,4]", f"{PP}=2", names=f"{STAGES}=[0,4]", suggests=f"{STAGES}=[2,2]"),
    layout(2, f"{STAGES}=[1,1,1]", f"{PP}=2", f"{VPP}=2", names=f"{STAGES}=[1,1,1] must be 4 numbers", suggests=f"{STAGES}=[1,1,1,1]"),
    layout(1, f"{STAGES}=[]", names=f"{STAGES}=[]", suggests=f"{STAGES}=[4]"),
    layout(2, f"{STAGES}=two", f"{PP}=2", "model.num_layers=2", names=STAGES, suggests=f"{STAGES}=[1,1]", also=["whole numbers in brackets"]),
    layout(4, f"{VPP}=2", f"{PP}=2", "train.global_batch_size=6", names="there are 3 in a step", suggests="train.global_batch_size=8", keep=True),
    # ZeRO
    layout(2, f"{ZERO}=3", f"{PP}=2", names=f"{ZERO}=3 with {PP}=2", suggests=f"{ZERO}=2 or 1", also=[f"{PP}=1"]),
    layout(2, f"{ZERO}=0", f"{PP}=2", names=f"{ZERO}=0 with {PP}=2", suggests=f"{ZERO}=2 or 1"),
    layout(2, f"{ZERO}=1", f"{PP}=2", "train.precision=bf16", names=f"{ZERO}=1 with {PP}=2", suggests=f"{ZERO}=2", also=["train.precision=fp32"]),
    layout(2, f"{PP}=2", "train.precision=bf16", names=f"{ZERO}=unset", suggests=f"{ZERO}=2", keep=True),
    layout(2, f"{ZERO}=3", f"{ETP}=2", f"{TP}=2", names=f"{ZERO}=3 with {ETP}=2", suggests=f"{ZERO}=2", also=[f"{ETP}=1"]),
    layout(2, f"{ZERO}=0", f"{EP}=2", names=f"{ZERO}=0", suggests=f"{ZERO}=1 or 2"),
    layout(2, f"{ZERO}=0", f"{TP}=2", names=f"{ZERO}=0", suggests=f"{ETP}=2", also=[f"{ZERO}=1 or 2"], keep=True),
    # muon, and the batch
    *(layout(2, f"{one}=2", "optimizer=muon", names=f"optimizer.kind=muon orthogonalises whole matrices, which {one}=2",
             suggests="optimizer.kind=adamw", also=[f"{one}=1 {ZERO}=0"], keep=True) for one in (TP, EP, PP)),
    layout(2, f"{EP}=2", "optimizer=muon", f"{ZERO}=0", names=f"{EP}=2", suggests=f"{EP}=1"),
    layout(2, "optimizer=muon", f"{CP}=2", names="optimizer.kind=muon", suggests=f"{ZERO}=0", keep=True),
    layout(4, f"{TP}=2", "train.global_batch_size=5", names="train.global_batch_size=5", suggests="train.global_batch_size=4", keep=True,
           also=["times 2 data-parallel processes"]),
    bad("run.world_size=4", "train.micro_batch_size=1", names="run.world_size=4", suggests="run.dry_run=true", keep=True, also=["run.world_size=0"]),
    bad("run.world_size=-1", "run.dry_run=true", names="run.world_size=-1", suggests="run.world_size=0"),
    bad("run.rank=3", names="run.rank=3", suggests="run.rank=0", also=["run.dry_run=true", "run.world_size=4"]),
    bad("run.rank=4", "run.dry_run=true", "run.world_size=4", "train.micro_batch_size=1", names="run.rank=4", suggests="run.rank=3", keep=True),
    bad("run.rank=-1", "run.dry_run=true", names="run.rank=-1", suggests="run.rank=0"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*UNKNOWN_NAMES, *WRONG_TYPES, *MODELS, *RUNS, *LAYOUTS])
def test_the_error_names_the_setting_and_a_value_that_works(case: Bad, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", str(case.world_size))
    with pytest.raises(ConfigError) as refusal:
        COMMANDS[case.command](case.given)
    message = str(refusal.value)
    assert case.names in message
    assert case.suggests in message, message
    for words in case.also:
        assert words in message
    for repaired in case.repaired():
        COMMANDS[case.command](repaired)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train=fast", "train is a group of settings.*train.steps"),
        ("model.grove={num_groves: 8}", "model.grove is a group of settings.*model.grove.num_groves"),
        ("zebra=1", "zebra is not a setting; there are: model, data"),
        ("optimizer.zebra=1", "optimizer.zebra is not a setting; there are: optimizer.kind"),
        ("hydra.verbose=true", "hydra.verbose is not a setting"),
        ("corpus=stdlib", "corpus is not a setting"),
        ("train.steps", "'train.steps' sets nothing; write setting=value"),
        ("=3", "'=3' sets nothing"),
        ("", "'' sets nothing"),
        ("train.steps={", "cannot be read"),
        ("~data.blend.zebra", "data.blend.zebra"),
    ],
)
def test_what_has_no_nearest_value_is_explained(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        compose_train([override])
