"""Every file in configs/ works, by existing; and wrong input is explained in one line."""

import numpy as np
import pytest
from commands import MLP, TEXT, THREADS
from omegaconf import OmegaConf

from modelpar import config as configs
from modelpar.errors import ConfigError
from modelpar.paths import config_dir
from modelpar.run.workers import Workers
from modelpar.task import task_of

COMMANDS = sorted(path.stem for path in config_dir().glob("*.yaml"))
FILES = sorted((path.parent.name, path.stem) for path in config_dir().glob("*/*.yaml"))
NEEDS = {
    ("data", "text"): ["data.path=text.txt"],
    ("data", "arrays"): ["data.path=samples.npz"],
    ("model", "file"): ["model.factory=model.py:build"],
    ("model", "hf"): ["model.config=GPT2Config"],
    ("partition", "manual"): ["partition.balance=[1,3]"],
}
"""What has no default."""
SMALL = {
    ("model", "gpt"): ["model.width=16", "model.depth=2", "model.heads=2", "data=text", "data.path=text.txt"],
    ("model", "convnet"): ["model.width=4", "model.depth=2"],
    ("model", "hf"): ["+model.n_layer=2", "+model.n_embd=16", "+model.n_head=2", "+model.vocab_size=50"],
}
"""What makes the tests quick."""
MODEL_PY = """
import torch
from torch import nn

def build():
    batch = torch.randn(6, 8), torch.randint(3, (6,))
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), batch, nn.functional.cross_entropy
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with something of every kind to train on."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 3)
    (tmp_path / "model.py").write_text(MODEL_PY)
    rng = np.random.default_rng(0)
    np.savez("samples.npz", inputs=rng.standard_normal((32, 8)), targets=np.arange(32) % 10)
    return tmp_path


def test_there_are_files():
    assert {"train", "simulate", "compare", "profile", "verify"} == set(COMMANDS)
    assert {group for group, _ in FILES} == set(configs.GROUPS)
    assert {
        ("model", "gpt"),
        ("model", "mlp"),
        ("model", "convnet"),
        ("model", "file"),
        ("model", "hf"),
        ("data", "stdlib"),
        ("data", "text"),
        ("data", "arrays"),
        ("data", "synthetic"),
        ("partition", "uniform"),
        ("partition", "by_parameters"),
        ("partition", "by_memory"),
        ("partition", "by_flops"),
        ("partition", "by_time"),
        ("partition", "optimal"),
        ("partition", "manual"),
        ("schedule", "gpipe"),
        ("schedule", "1f1b"),
        ("schedule", "fill_drain"),
        ("optimizer", "sgd"),
        ("optimizer", "adamw"),
        ("cluster", "default"),
        ("cluster", "two_hosts"),
        ("transport", "rpc"),
        ("transport", "threads"),
    } <= set(FILES)


@pytest.mark.parametrize(("group", "choice"), FILES)
def test_every_choice_makes_what_can_be_planned_and_trained(folder, monkeypatch, group, choice):
    """A new file in configs/ is tested here as soon as it exists; what has no default goes into NEEDS."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    model = [] if group == "model" or choice in ("stdlib", "text") else MLP[:-1]
    threads = [word for word in THREADS if group != "transport" or not word.startswith("transport")]
    if choice in ("stdlib", "text"):
        model = SMALL["model", "gpt"][:3]
    wanted = [*model, *threads, f"{group}={choice}", *NEEDS.get((group, choice), []), *SMALL.get((group, choice), [])]
    config = configs.load("train", [*wanted, "training.batch_size=8", "pipeline.num_microbatches=2"])
    task = task_of(config)
    plan = task.plan()
    assert plan.num_ranks == plan.num_stages == config.pipeline.num_ranks
    assert plan.prediction.step_seconds > 0
    assert isinstance(task.workers(2), Workers)
    assert task.data.description
    inputs, _ = next(iter(task.data.heldout(4, 4)))
    assert len(inputs) > 0
    if plan.schedule.kind == "train":
        task.pipeline(plan)
    else:
        with pytest.raises(ConfigError, match="the schedule has no backward; expected one that trains"):
            task.pipeline(plan)


@pytest.mark.parametrize(
    ("words", "layers", "cuts"),
    [
        ("", "stem b0 b1 head", (1, 2, 3)),
        ("pipeline.split_before=[b0.linear]", "stem b0.norm b0.linear b0.dropout b1 head", (1, 2, 3, 4, 5)),
        (
            "pipeline.split_before=[b0.linear] pipeline.keep_together=[b0]",
            "stem b0.norm b0.linear b0.dropout b1 head",
            (1, 4, 5),
        ),
        ("pipeline.split_before=[b?.linear] pipeline.keep_together=['b*']", None, (1, 4, 7)),
        ("pipeline.leaf=[b0]", "stem b0 b1 head", (1, 2, 3)),
    ],
)
def test_how_finely_a_model_may_be_cut_is_an_option(words, layers, cuts):
    quick = [*MLP, *THREADS, "training.batch_size=8", "pipeline.num_microbatches=2"]
    graph = task_of(configs.load("train", [*quick, *words.split()])).plan().graph
    assert layers is None or [layer.name for layer in graph.layers] == layers.split()
    assert graph.cuts == cuts


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_what_train_takes(command):
    train, config = configs.load("train", []), configs.load(command, [])
    own = {key: value for key, value in config.items() if key not in train}
    if command == "verify":  # which has no use for times
        assert config.pipeline.profile == "flops"
        config.pipeline.profile = train.pipeline.profile
    assert OmegaConf.masked_copy(config, list(train)) == train
    more = {
        "compare": {"comparison": {"rounds": 3, "steps": 4}, "measure": None},
        "profile": {"file": "profile.json"},
        "simulate": {"profile": None},
    }
    more["verify"] = {"steps": 3}
    assert own == more.get(command, {})
    assert train.model == configs.load("train", ["model=gpt"]).model
    assert train.data == configs.load("train", ["data=stdlib"]).data


def test_models_bring_their_data_unless_others_are_named():
    targets = {
        words: configs.load("train", words.split()).data._target_.rpartition(".")[2]
        for words in ("model=gpt", "model=mlp", "model=convnet", "model=mlp data=arrays data.path=x", "data=synthetic")
    }
    assert list(targets.values()) == ["stdlib", "synthetic", "synthetic", "arrays", "synthetic"]


def test_references_follow_what_is_asked_for():
    config = configs.load("train", ["model.context=32", "training.steps=7", "partition=by_memory"])
    assert (config.data.context, config.lr_schedule.steps, config.partition.microbatches) == (32, 7, 8)


def test_a_choice_is_named_by_its_file():
    for group, choice in FILES:
        config = configs.load("train", [f"{group}={choice}", *NEEDS.get((group, choice), [])])
        if "_target_" in config[group]:
            assert configs.choice(config, group) == choice
    config = configs.load("train", ["optimizer._target_=torch.optim.RMSprop"])
    assert configs.choice(config, "optimizer") == "RMSprop"


SECTIONS = (
    "data, model, partition, schedule, transport, optimizer, lr_schedule, pipeline, training, output, verbose, cluster"
)
TRAINING = ", ".join(
    f"training.{name}"
    for name in ("steps", "batch_size", "max_norm", "seed", "eval_every", "eval_samples", "trace_every")
)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("modle=mlp", f"modle is unknown; did you mean model? expected one of {SECTIONS}"),
        ("+extra=1", f"extra is unknown; expected one of {SECTIONS}"),
        ("training.stepz=3", f"training.stepz is unknown; did you mean training.steps? expected one of {TRAINING}"),
        ("+training.foo=3", f"training.foo is unknown; did you mean training.seed? expected one of {TRAINING}"),
        ("training.steps.x=1", f"training.steps.x is unknown; did you mean training.steps? expected one of {TRAINING}"),
        (
            "model=mlp model.heads=2",
            "model.heads is unknown; did you mean model.width? expected one of model.input_shape, model.num_classes, "
            "model.width, model.depth, model.dropout",
        ),
        ("model=mpl", "model=mpl is unknown; did you mean mlp? expected one of convnet, file, gpt, hf, mlp"),
        ("schedule=zigzag", "schedule=zigzag is unknown; expected one of 1f1b, fill_drain, gpipe"),
        ("model=[mlp,gpt]", "model=[mlp,gpt] gives several choices; expected one of convnet, file, gpt, hf, mlp"),
        (
            "model=mlp,gpt",
            "model=mlp,gpt gives several values; expected one, or `modelpar compare` or `train -m` to try each",
        ),
        (
            "optimizer.betas=0.9,0.95",
            "optimizer.betas=0.9,0.95 gives several values; expected one, a list optimizer.betas=[0.9,0.95], or "
            "`modelpar compare` or `train -m` to try each",
        ),
        ("training.steps", "training.steps is malformed; expected key=value"),
        ("schedule=1f1b,", "schedule=1f1b, is malformed; expected key=value"),
        ("training.steps=${", "training.steps=${ is malformed; expected key=value"),
        ("data=text", "data.path has no value; expected data.path=… on the command line"),
        ("model=file", "model.factory has no value; expected model.factory=… on the command line"),
        ("partition=manual", "partition.balance has no value; expected partition.balance=… on the command line"),
        ("partition=manual partition.balance=3", "partition.balance is 3; expected a list"),
        ("training.steps=abc", "training.steps is 'abc'; expected a whole number"),
        ("training.steps=1.5", "training.steps is 1.5; expected a whole number"),
        ("training.steps=true", "training.steps is True; expected a whole number"),
        ("training.steps=null", "training.steps is null; expected a whole number"),
        ("training.steps=", "training.steps is ''; expected a whole number"),
        ("training.steps=[1,2]", "training.steps is [1, 2]; expected a whole number"),
        ("training.steps=${data.heldout}", "training.steps is 0.1; expected a whole number"),
        ("training.max_norm=abc", "training.max_norm is 'abc'; expected a number"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'; expected a number"),
        ("optimizer.lr=null", "optimizer.lr is null; expected a number"),
        ("optimizer.betas=0.9", "optimizer.betas is 0.9; expected a list"),
        ("model.tied=1", "model.tied is 1; expected true or false"),
        ("output.folder=null", "output.folder is null; expected text"),
        ("pipeline.num_threads=x", "pipeline.num_threads is 'x'; expected a whole number"),
        ("pipeline.devices=cpu", "pipeline.devices is 'cpu'; expected a list"),
        ("transport.step_timeout=soon", "transport.step_timeout is 'soon'; expected a number"),
        (
            "training=3",
            f"training is 3; expected training.… with one of {TRAINING.replace('training.', '')}",
        ),
        ("verbose=3", "verbose is 3; expected 0 (quiet), 1, or 2 (says more)"),
        ("verbose=-1", "verbose is -1; expected 0 (quiet), 1, or 2 (says more)"),
        ("verbose=true", "verbose is True; expected a whole number"),
        ("cluster.memory=true", "cluster.memory is True; expected bytes, or such as 8GB"),
        (
            "cluster.memory=8XB",
            "cluster.memory is '8XB'; expected bytes above 0, as a number or such as 8GB or 512MiB",
        ),
        ("cluster.devices=4", "cluster.devices is 4; expected a list"),
        ("cluster.devices=[4,4]", "cluster.devices[0] is 4; expected {speed: …, memory: …}"),
        ("cluster.devices=[{ram:4},{}]", "cluster.devices[0].ram is unknown; expected one of speed, memory"),
        ("cluster.devices=[{},{speed:0}]", "cluster.devices[1].speed is 0.0; expected a number above 0"),
        ("cluster.devices=[{},{speed:fast}]", "cluster.devices[1].speed is 'fast'; expected a number"),
        (
            "cluster.devices=[{},{},{}]",
            "pipeline.num_ranks is 2, but cluster.devices has 3; expected as many ranks as devices, such as "
            "pipeline.num_ranks=3",
        ),
        (
            "cluster=two_hosts pipeline.num_ranks=2",
            "pipeline.num_ranks is 2, but cluster.devices has 4; expected as many ranks as devices, such as "
            "pipeline.num_ranks=4",
        ),
        ("cluster.link.latency=-1", "cluster.link.latency is -1; expected seconds from 0 up"),
        (
            "cluster.link.bandwidth=0",
            "cluster.link.bandwidth is 0; expected bytes above 0, as a number or such as 8GB or 512MiB",
        ),
        ("cluster.links=[{ranks:[0]}]", "cluster.links[0].ranks is [0]; expected two ranks, such as [0, 1]"),
        ("cluster.links=[{ranks:[0,2]}]", "a link joins ranks 0 and 2; expected two of 0 … 1"),
        ("~optimizer", "optimizer was taken away; expected a value"),
        ("~optimizer.lr", "optimizer.lr was taken away; expected a value"),
    ],
)
def test_wrong_input_is_explained_in_one_line(words, message):
    with pytest.raises(ConfigError) as error:
        configs.load("train", words.split())
    assert str(error.value) == message


@pytest.mark.parametrize("word", ["=3", "model=null", "+model=mlp", "training.steps=${pipeline.ranks}", "'a=3"])
def test_stranger_things_take_one_line_too(word):
    with pytest.raises(ConfigError) as error:
        configs.load("train", [word])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("optimizer.lr=1", "optimizer.lr", 1),
        ("training.max_norm=null", "training.max_norm", None),
        ("training.max_norm=2", "training.max_norm", 2),
        ("+optimizer.amsgrad=true", "optimizer.amsgrad", True),
        ("pipeline.num_threads=2", "pipeline.num_threads", 2),
        ("pipeline.devices=[cpu,cpu]", "pipeline.devices", ["cpu", "cpu"]),
        ("transport.step_timeout=30", "transport.step_timeout", 30),
        ("training.steps=${pipeline.num_ranks}", "training.steps", 2),
        ("cluster.memory=8GB", "cluster.memory", "8GB"),
        ("cluster.memory=8000", "cluster.memory", 8000),
        ("cluster=two_hosts", "pipeline.num_ranks", 4),
        ("output.name=7", "output.name", 7),
        ("hydra.verbose=true", "training.seed", 0),
    ],
)
def test_what_is_right_passes(words, key, value):
    assert OmegaConf.select(configs.load("train", words.split()), key) == value


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("partition=uniform", ["partition=uniform"]),
        ("partition=uniform,optimal", ["partition=uniform", "partition=optimal"]),
        ("partition=glob(u*)", ["partition=uniform"]),
        ("pipeline.num_ranks=range(1,4)", [f"pipeline.num_ranks={i}" for i in (1, 2, 3)]),
        ("partition.balance=[1,3],[2,2]", ["partition.balance=[1,3]", "partition.balance=[2,2]"]),
        ("optimizer.betas=[0.9,0.95]", ["optimizer.betas=[0.9,0.95]"]),
        ("+optimizer.eps=1e-8,1e-6", ["+optimizer.eps=1e-08", "+optimizer.eps=1e-06"]),
        ("data.path='a,b'", ["data.path='a,b'"]),
    ],
)
def test_lists(word, expected):
    assert configs.parse_lists(["model=mlp", word]) == [["model=mlp"], expected]


def test_a_malformed_list_is_refused():
    with pytest.raises(ConfigError) as error:
        configs.parse_lists(["partition=uniform,"])
    assert str(error.value) == "partition=uniform, is malformed; expected key=value"
