"""A user's own folder of configurations, by --config-dir or hydra.searchpath, is known to every command."""

import re
import shlex
from textwrap import dedent

import pytest
from commands import call
from omegaconf import OmegaConf

from modelpar import config as configs
from modelpar.errors import ConfigError
from modelpar.task import task_of

QUICK = "transport=threads pipeline.profile=flops pipeline.num_threads=1 pipeline.num_microbatches=2"
FILES = {
    "conf/model/mine.yaml": """
        defaults:
          - override /data@_global_.data: synthetic
        _target_: own_models.build
        size: ???
        depth: 3
    """,
    "conf/partition/even.yaml": """
        _target_: modelpar.planning.partitioners.uniform
        _partial_: true
    """,
    "conf/experiment/small.yaml": """
        # @package _global_
        defaults:
          - override /model: mine
          - override /partition: even
          - override /data: synthetic
        model: {size: 4}
        data: {input_shape: [4], num_classes: 4, num_samples: 32}
        training: {steps: 2, batch_size: 4}
    """,
    "conf/experiment/typo.yaml": """
        # @package _global_
        training: {stepz: 2}
    """,
    "conf/experiment/wrong_type.yaml": """
        # @package _global_
        training: {steps: many}
    """,
    "conf/experiment/no_such_model.yaml": """
        # @package _global_
        defaults:
          - override /model: mlq
    """,
    "conf/experiment/broken.yaml": """
        training: {steps: 2
    """,
    "taken/model/gpt.yaml": "_target_: own_models.build",
    "own_models.py": """
        from torch import nn, ones
        def build(size, depth):
            layers = [nn.Linear(size, size) for _ in range(depth)]
            return nn.Sequential(*layers), (ones(4, size), ones(4, size)), nn.functional.cross_entropy
    """,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return tmp_path


@pytest.mark.parametrize("words", ["hydra.searchpath=[conf]", "hydra.searchpath=[file://conf]"])
def test_an_experiment_chooses_and_sets(folder, words):
    config = configs.load("train", [words, "+experiment=small"])
    assert config.model == {"_target_": "own_models.build", "size": 4, "depth": 3}
    assert (config.training.steps, config.training.batch_size, config.training.seed) == (2, 4, 0)
    assert "experiment" not in config
    assert "hydra" not in config
    assert task_of(config).plan("flops").partition.method == "uniform"
    config = configs.load("train", [words, "+experiment=small", "model.depth=5", "partition=by_parameters"])
    assert (config.model.depth, config.partition._target_.rpartition(".")[2]) == (5, "by_parameters")


@pytest.mark.parametrize("flag", ["--config-dir conf", "--config-dir=conf", "-cd conf", "hydra.searchpath=[conf]"])
def test_every_command_takes_the_folder(folder, flag):
    words = [*shlex.split(flag), "+experiment=small", *QUICK.split()]
    for command in ("simulate", "verify", "profile", "compare", "train"):
        more = {"compare": ["measure=0", "partition=even,by_flops"], "verify": ["steps=1"]}.get(command, [])
        outcome = call(command, *words, *more, f"output.name={command}")
        assert (outcome.code, outcome.err) == (0, ""), command
    table = call("compare", *words, "measure=0", "partition=even,by_flops", "output.name=again").out
    assert {"uniform", "by_flops"} <= set(table.split())


def test_several_runs_and_hydras_own_flags_take_it_too(folder):
    outcome = call("train", "-m", "--config-dir", "conf", "+experiment=small", *QUICK.split(), "model.depth=3,4")
    assert outcome.code == 0
    assert len(list((folder / "runs").iterdir())) == 2
    shown = OmegaConf.create(call("train", "--config-dir", "conf", "+experiment=small", "--cfg", "job").out)
    assert shown == configs.load("train", ["hydra.searchpath=[conf]", "+experiment=small"])


def test_a_runs_folder_holds_everything_without_the_users(folder):
    call("train", "--config-dir", "conf", "+experiment=small", *QUICK.split(), "output.name=mine")
    config = OmegaConf.load("runs/mine/config.yaml")
    (folder / "conf").rename(folder / "gone")
    assert task_of(config).plan("flops").num_stages == 2
    assert call("explain", "runs/mine").code == 0


def test_help_lists_the_users_choices_and_groups(folder):
    lines = [line.split() for line in call("train", "--help", "--config-dir", "conf").out.splitlines()]
    assert ["model", "convnet,", "file,", "gpt,", "hf,", "mine,", "mlp"] in lines
    assert ["+experiment", "broken,", "no_such_model,", "small,", "typo,", "wrong_type"] in lines
    assert "mine" not in call("train", "--help").out.split("options")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("model=mien", "model=mien is unknown; did you mean mine? expected one of convnet, file, gpt, hf, mine, mlp"),
        (
            "+experiment=smal",
            "experiment=smal is unknown; did you mean small? expected one of broken, no_such_model, small, typo, "
            "wrong_type",
        ),
        ("experiment=small", "experiment is a group of yours that nothing is chosen from yet; expected +experiment=…"),
        (
            "+experiment=small model.sise=3",
            "model.sise is unknown; did you mean model.size? expected one of model.size, model.depth",
        ),
        ("model=mine", "model.size has no value; expected model.size=… on the command line"),
        ("model=mine model.size=2 model.depth=x", "model.depth is 'x'; expected a whole number"),
        ("+experiment=wrong_type", "training.steps is 'many'; expected a whole number"),
        (
            "+experiment=no_such_model",
            "model=mlq is unknown; did you mean mlp? expected one of convnet, file, gpt, hf, mine, mlp",
        ),
        (
            "model=[mine,mlp]",
            "model=[mine,mlp] gives several choices; expected one of convnet, file, gpt, hf, mine, mlp",
        ),
    ],
)
def test_wrong_input_is_explained_with_the_users_choices(folder, words, message):
    with pytest.raises(ConfigError) as error:
        configs.load("train", ["hydra.searchpath=[conf]", *words.split()])
    assert str(error.value) == message


def test_values_of_an_experiment_are_checked(folder):
    for command in ("train", "simulate", "compare", "verify", "profile"):
        outcome = call(command, "--config-dir", "conf", "+experiment=typo")
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("modelpar: training.stepz is unknown; did you mean training.steps? expected")
        broken = call(command, "--config-dir", "conf", "+experiment=broken")
        assert (broken.code, broken.err.count("\n")) == (2, 1)
        assert "conf/experiment/broken.yaml, line " in broken.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--config-dir nowhere",
            "--config-dir is nowhere, which is not a folder; expected one with your configurations",
        ),
        ("hydra.searchpath=[file://no]", "hydra.searchpath names no, which is not a folder; expected one with your .*"),
        ("hydra.searchpath=[conf,no]", "hydra.searchpath names no, which is not a folder; expected one with your .*"),
        ("--config-dir", "--config-dir has no value; expected --config-dir path/to/folder"),
        (
            "--config-dir conf hydra.searchpath=[conf]",
            r"--config-dir conf and hydra.searchpath=\[conf\] both name folders; expected one of the two",
        ),
        (
            "--config-dir taken model=gpt",
            ".*taken/model/gpt.yaml has the name of one of modelpar's own, which is taken; .*",
        ),
    ],
)
def test_a_folder_that_is_not_there_or_cannot_be_used_costs_one_line(folder, words, message):
    for command in ("train", "simulate", "compare", "verify", "profile"):
        outcome = call(command, *words.split())
        assert (outcome.code, outcome.out) == (2, "")
        assert re.fullmatch(f"modelpar: {message}\n", outcome.err), outcome.err
