"""Composition: what the shipped files, a user's own files and overrides make together, and that nothing of it stays behind."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase
from hypothesis import given, settings
from hypothesis import strategies as st

from kan_train.config import Config, ConfigError, GenerateConfig, PrepareConfig
from kan_train.config.compose import choices, compose_settings, compose_train, from_yaml, to_yaml

CONF = Path(__file__).resolve().parents[2] / "conf"
# Read by code of their own: no choices of a run.
DATA = ("prices", "table")
FOLDERS = [folder for folder in sorted(CONF.iterdir()) if folder.is_dir() and folder.name not in DATA]
GROUPS = [(folder.name, leaf.stem) for folder in FOLDERS for leaf in sorted(folder.glob("*.yaml"))]
# What a choice needs besides itself.
NEEDS = {"directory": ["corpus.path=texts"], "huggingface": ["corpus.dataset=some/name"], "expert": ["train.micro_batch_size=4"]}
PROCESSES = dict.fromkeys(["tensor", "expert", "context", "pipeline"], 2)


def write(folder: Path, name: str, text: str | bytes) -> Path:
    """`folder`, now with the file `name` in it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_the_default_run_is_the_tiny_model_on_the_standard_library():
    config = compose_train([])
    assert (config.model.name, config.run.name, config.data.blend) == ("kan_tiny", "kan_tiny", {"stdlib": 1.0})
    assert (config.optimizer.kind, config.parallel.zero_stage, config.cluster.name) == ("adamw", None, "local")


@pytest.mark.parametrize(("group", "choice"), GROUPS, ids=["=".join(pair) for pair in GROUPS])
def test_every_shipped_choice_composes_and_is_valid(group: str, choice: str):
    override = [f"{group}={choice}", *NEEDS.get(choice, [])]
    if group == "corpus":
        assert compose_settings(PrepareConfig, override).corpus.kind == choice
    else:
        assert isinstance(compose_train(override, world_size=PROCESSES.get(choice, 1)), Config)


def test_groups_are_listed_for_the_command_that_has_them():
    assert "corpus" not in choices("train")
    assert list(choices("prepare")) == ["corpus"]
    assert choices("generate") == {}
    assert choices("train")["parallel"] == sorted(leaf.stem for leaf in (CONF / "parallel").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "blend"),
    [
        (["data=debian_docs"], {"debian_docs": 1.0}),
        (["data=mixed"], {"stdlib": 0.5, "debian_docs": 0.5}),
        (["+data.blend.mine=2"], {"stdlib": 1.0, "mine": 2.0}),
        (["+data.blend.mine=1.0", "~data.blend.stdlib"], {"mine": 1.0}),
        (["data=mixed", "data.blend.stdlib=0.25"], {"stdlib": 0.25, "debian_docs": 0.5}),
    ],
)
def test_a_blend_is_what_was_chosen_and_nothing_more(overrides: list[str], blend: dict[str, float]):
    assert compose_train(overrides).data.blend == blend


def test_derived_names_follow_all_overrides():
    assert compose_train(["run.name=${model.name}-b", "model.name=mine", "model=kan_125m"]).run.name == "mine-b"


def test_the_last_of_two_values_holds():
    assert compose_train(["train.steps=40", "train.steps=50"]).train.steps == 50


def test_an_optional_setting_takes_null():
    assert compose_train(["parallel=zero2", "parallel.zero_stage=null"]).parallel.zero_stage is None


def test_the_world_size_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="times 2 data-parallel processes"):
        compose_train(["train.micro_batch_size=8"])
    assert compose_train([], world_size=1).train.micro_batch_size == 8
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="WORLD_SIZE='two'"):
        compose_train([])


@pytest.mark.parametrize(("overrides", "world_size", "expected"), [
    ([], 2, 4), (["parallel.tensor_parallel=2"], 4, 4), (["train.global_batch_size=96"], 2, 8), (["train.global_batch_size=21"], 1, 7),
    (["run.dry_run=true", "run.world_size=8"], 1, 1), (["train.micro_batch_size=2"], 2, 2),
])  # fmt: skip
def test_a_micro_batch_that_is_not_given_divides_the_ranks_share(overrides, world_size, expected):
    assert compose_train(overrides, world_size=world_size).train.micro_batch_size == expected


def test_a_dry_run_is_validated_for_the_processes_that_it_describes():
    overrides = ["parallel.tensor_parallel=4", "train.global_batch_size=2048", "run.dry_run=true"]
    assert compose_train([*overrides, "run.world_size=1024"], world_size=1).run.world_size == 1024
    with pytest.raises(ConfigError, match=r"parallel.tensor_parallel=4 must divide the number of processes, 1;"):
        compose_train(overrides, world_size=1)


# --- a user's own files


def test_a_users_folder_adds_choices_and_groups(tmp_path: Path):
    folder = write(tmp_path / "it's my, folder", "model/mine.yaml", "name: mine\nwidth: 64\n")
    write(folder, "experiment/fast.yaml", "# @package _global_\ntrain:\n  steps: 77\noptimizer:\n  clip_norm: 0.5\n")
    config = compose_train(["model=mine", "+experiment=fast", "train.micro_batch_size=4"], [folder])
    assert (config.model.name, config.model.width, config.train.steps, config.optimizer.clip_norm) == ("mine", 64, 77, 0.5)
    assert choices("train", [folder])["experiment"] == ["fast"]


def test_an_experiment_may_choose_from_the_groups(tmp_path: Path):
    leaf = "# @package _global_\ndefaults:\n  - override /model: dense_tiny_active\n  - override /data: mixed\ntrain:\n  steps: 50\n"
    config = compose_train(["+experiment=dense"], [write(tmp_path, "experiment/dense.yaml", leaf)])
    assert (config.model.name, config.train.steps, len(config.data.blend)) == ("dense_tiny_active", 50, 2)


def test_several_folders_are_searched(tmp_path: Path):
    first, second = write(tmp_path / "a", "model/one.yaml", "name: one\n"), write(tmp_path / "b", "data/two.yaml", "blend: {two: 1}\n")
    config = compose_train(["model=one", "data=two"], [first, second])
    assert (config.model.name, config.data.blend) == ("one", {"two": 1.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: mine\ngroves: 4\n", "in model/mine.yaml: model.groves is not a setting; did you mean model.grove"),
        ("name: mine\ngrove:\n  num_grove: 4\n", r"model/mine.yaml: model.grove.num_grove is not .* did you mean model.grove.num_groves\?"),
        ("name: mine\nwidth: wide\n", "in model/mine.yaml: model.width=wide must be a whole number; use model.width=128"),
        ("name: mine\ngrove: 4\n", "in model/mine.yaml: model.grove is a group of settings"),
        ("name: [mine\n", "not valid YAML.*mine.yaml"),
        ("name: mine\nname: yours\n", "not valid YAML.*duplicate key name"),
        (b"name: m\xe9lange\n", "mine.yaml is not UTF-8 text"),
        ("- mine\n", "in model/mine.yaml: model is a group of settings"),
        ("name: ${modell.width}\n", "did you mean model.name=..model.width."),
        ("defaults:\n  - nothing_here\n", "model=nothing_here is not known; choices of model: .*kan_tiny"),
        ("# @package elsewhere\nname: mine\n", "in model/mine.yaml: elsewhere is not a setting"),
    ],
)
def test_a_users_file_is_checked_like_ours(tmp_path: Path, text: str | bytes, message: str):
    with pytest.raises(ConfigError, match=message):
        compose_train(["model=mine"], [write(tmp_path, "model/mine.yaml", text)])


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"--config-dir .*nowhere is not a folder"):
        compose_train([], [tmp_path / "nowhere"])


# --- text is taken as it is typed

TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30)


def hydra_has_its_own_reading(text: str) -> bool:
    return text == "???" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\"")


@settings(max_examples=20, deadline=None)
@given(TEXT.filter(lambda text: not hydra_has_its_own_reading(text)))
def test_a_prompt_arrives_unchanged(prompt: str):
    assert compose_settings(GenerateConfig, ["run=x", f"prompt={prompt}"]).prompt == prompt


CODE = ["def main():", "a, b = [1], {2: 3}", "it's", "\\", "\\'", "x\\\\'", "1e3", "null", "true", ""]
CODE += [" two ", "${HOME} \\${x}", "a\nb", "a=b", "#", "'"]


@pytest.mark.parametrize("prompt", CODE)
def test_code_is_a_prompt(prompt: str):
    assert compose_settings(GenerateConfig, ["run=x", f"prompt={prompt}"]).prompt == prompt


def test_a_quoted_text_loses_its_quotes_as_hydra_users_expect():
    assert compose_train(["run.name='1e3'"]).run.name == "1e3"


# --- the saved configuration


@settings(max_examples=30, deadline=None)
@given(root=TEXT, dataset=TEXT.filter(lambda text: text != "???"), rate=st.floats(1e-12, 1e3))
def test_a_saved_configuration_comes_back_equal(root: str, dataset: str, rate: float):
    config = Config()
    config.run.name, config.run.root, config.data.blend = "saved", root.replace("???", ""), {dataset: rate}
    config.optimizer.learning_rate = rate
    assert from_yaml(to_yaml(config)) == config


def test_a_saved_file_is_data(monkeypatch: pytest.MonkeyPatch):
    """A stranger's file reads no environment variable and no other setting."""
    monkeypatch.setenv("SECRET", "leaked")
    assert from_yaml("run: {name: '${oc.env:SECRET}', root: '${model.name}'}\ndata: {blend: {a: 1}}").run.name == "${oc.env:SECRET}"


def test_a_saved_configuration_of_many_processes_is_read_in_one():
    config = compose_train(["parallel=pipeline", "parallel.tensor_parallel=2", "parallel.stage_layers=[1,3]"], world_size=4)
    assert config.parallel.stage_layers == [1, 3]
    assert from_yaml(to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("model: {widht: 3}", "model.widht is not a setting; did you mean model.width"),
        ("train: {steps: few}", "train.steps=few must be a whole number"),
        ("data: {blend: {a: .nan}}", "data.blend.a=nan is not a finite number"),
        ("data: {blend: {a: 1}}\nmodel: {vocab_size: 100}", "model.vocab_size=100 must be a multiple of 128"),
        ("run: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("run: [", "not valid YAML"),
    ],
)
def test_a_damaged_saved_file_is_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        from_yaml(text)


# --- nothing stays behind


def test_two_compositions_share_nothing():
    first = compose_train([])
    first.data.blend["mine"] = 1.0
    first.model.grove.num_groves = 3
    assert compose_train([]).data.blend == {"stdlib": 1.0}
    assert compose_train([]).model.grove.num_groves == 32


@pytest.mark.parametrize("overrides", [[], ["model=unknown"]], ids=["success", "failure"])
def test_hydras_global_state_is_as_before(overrides: list[str]):
    """Inside another Hydra application too: that one keeps its very object."""
    assert not GlobalHydra.instance().is_initialized()
    with initialize_config_module("kan_train.conf", version_base="1.2"):
        outer, base = GlobalHydra.instance().hydra, VersionBase.instance().getbase()
        try:
            compose_train(overrides)
        except ConfigError:
            assert overrides
        assert GlobalHydra.instance().hydra is outer
        assert VersionBase.instance().getbase() == base
    assert not GlobalHydra.instance().is_initialized()


def test_a_composition_takes_less_than_a_second():
    compose_train([])
    start = time.process_time()
    compose_train(["model=kan_125m", "data=mixed", "train.steps=100", "optimizer.learning_rate=1e-3"])
    assert time.process_time() - start < 1


def test_the_types_need_no_hydra():
    code = "import sys, kan_train.config.schema; print([m for m in ('hydra', 'omegaconf', 'yaml', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"


def test_generate_and_prepare_have_their_own_settings():
    assert compose_settings(GenerateConfig, ["run=first", "top_k=5"]) == GenerateConfig(run="first", top_k=5)
    assert compose_settings(PrepareConfig, ["workers=3", "corpus=debian_docs"]).corpus.name == "debian_docs"
