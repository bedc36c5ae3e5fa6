"""The command line: help, exit codes, and bad input, which costs one line before anything starts."""

import re
import shlex
import socket
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
from commands import GPT, MLP, TEXT, THREADS, Command, call, listing
from conftest import ROOT
from omegaconf import OmegaConf

from modelpar import config as configs
from modelpar.cli import _COMMANDS, _EXAMPLES, main

MODEL_PY = """
import torch
from torch import nn

BATCH = torch.randn(6, 8), torch.randint(3, (6,))
LOSS = nn.functional.cross_entropy

def good():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)), BATCH, LOSS

def nothing():
    pass

def unsplittable():
    return nn.Linear(8, 3), BATCH, LOSS

def failing():
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 3)), BATCH, LOSS

def raising():
    raise OSError("no such weights")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with good and bad things in it, in which no process may be started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nonsense")
    (tmp_path / "model.py").write_text(MODEL_PY)
    rng = np.random.default_rng(0)
    np.savez("good.npz", inputs=rng.standard_normal((32, 8)), targets=np.arange(32) % 10)
    np.savez("wide.npz", inputs=rng.standard_normal((32, 9)), targets=np.arange(32) % 10)
    np.savez("labels.npz", inputs=rng.standard_normal((32, 8)), targets=np.arange(32) + 10)
    np.savez("half.npz", inputs=rng.standard_normal((32, 8)))

    def refuse(*arguments, **options):
        raise AssertionError(f"a process was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    return tmp_path


def refused(folder, words):
    """Calls a command that must end with code 2 and one line; returns that line."""
    before = set(folder.iterdir())
    outcome = call(*shlex.split(words))
    assert outcome.code == 2
    assert outcome.err.startswith("modelpar: ")
    assert outcome.err.count("\n") == 1
    assert "Traceback" not in outcome.out
    made = {path for path in folder.iterdir() if path not in before and path.name != "__pycache__"}
    assert not [path for path in made if any(path.iterdir())]
    return outcome.err.removeprefix("modelpar: ").rstrip("\n")


GPT_WORDS, MLP_WORDS = " ".join([*GPT, "pipeline.profile=flops"]), " ".join([*MLP[:-1], "pipeline.profile=flops"])
FILE = "model=file pipeline.profile=flops model.factory=model.py"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("modle=mlp", "modle is unknown; did you mean model\\? expected one of data, .*"),
        ("--fast", "--fast is not an option of train; expected overrides, --config-dir, -m, --multirun, .*"),
        ("-m schedule=gpipe,1f1", "schedule=1f1 is unknown; did you mean 1f1b\\? expected one of .*"),
        (f"{GPT_WORDS} pipeline.num_ranks=99", "99 stages, but the model has .* layers .*; expected at most .*"),
        (f"{GPT_WORDS} pipeline.num_ranks=0", "num_ranks is 0 and num_microbatches 8; expected at least 1 of both"),
        (
            f"{GPT_WORDS} pipeline.num_microbatches=0",
            "num_ranks is 2 and num_microbatches 0; expected at least 1 of both",
        ),
        (f"{GPT_WORDS} pipeline.num_threads=0", "num_threads is 0; expected at least 1"),
        (f"{GPT_WORDS} pipeline.devices=[cuda:98,cuda:99]", "device 'cuda:98' cannot be used: .+"),
        (f"{GPT_WORDS} pipeline.devices=[cpu]", "1 devices \\['cpu'\\] for 2 ranks; expected one per rank"),
        (f"{GPT_WORDS} pipeline.profile=guess", "profile is 'guess'; expected measured, anew, alone, flops, or .*"),
        (f"{GPT_WORDS} pipeline.tied=loose", 'tied is \'loose\'; expected "fast" or "exact"'),
        (
            f"{GPT_WORDS} pipeline.leaf=[h9]",
            "leaf='h9' fits no module of the model; expected an FQN, a pattern such as 'h\\.\\*', or a class name; .*",
        ),
        (f"{GPT_WORDS} pipeline.split_before=[3]", "split_before='3' fits no module of the model; .*"),
        (f"{GPT_WORDS} pipeline.keep_together=[null]", "keep_together='None' fits no module of the model; .*"),
        (f"{GPT_WORDS} pipeline.leaf=h0", "pipeline.leaf is 'h0'; expected a list"),
        (
            f"{GPT_WORDS} pipeline.leaf=[h0] pipeline.split_before=[h0.attn]",
            "leaf names h0, which split_before needs to look into; expected one of the two",
        ),
        (f"{GPT_WORDS} training.steps=0", "training.steps is 0; expected at least 1"),
        (f"{GPT_WORDS} training.batch_size=0", "training.batch_size is 0; expected at least 1"),
        (f"{GPT_WORDS} training.seed=-1", "training.seed is -1; expected at least 0"),
        (f"{GPT_WORDS} training.eval_every=-1", "training.eval_every is -1; expected at least 0"),
        (f"{GPT_WORDS} training.max_norm=-1", "max_norm is -1; expected a number above 0, or None"),
        (f"{GPT_WORDS} optimizer.lr=-1", "the optimizer .* cannot be used: Invalid learning rate: -1"),
        (f"{GPT_WORDS} +optimizer.speed=1", "the optimizer .* cannot be used: .*unexpected keyword argument 'speed'"),
        (f"{GPT_WORDS} optimizer._target_=torch.optim.Magic", "optimizer cannot be made: .*torch.optim.Magic.*"),
        (f"{GPT_WORDS} lr_schedule.warmup=2", "warmup is 2 and final .*"),
        (f"{GPT_WORDS} schedule=fill_drain", "the schedule has no backward; expected one that trains, such as .*"),
        (
            f"{GPT_WORDS} partition=manual partition.balance=[1,2]",
            "balance \\[1, 2\\] adds up to 3 layers with 2 stages; expected positive counts that add up to 4",
        ),
        (f"{GPT_WORDS} partition=manual partition.balance=[0,4]", "balance \\[0, 4\\] .*expected positive counts .*"),
        (f"{GPT_WORDS} partition=manual partition.balance=[4]", "balance \\[4\\] has 1 stages; expected 2"),
        (f"{GPT_WORDS} partition=manual partition.balance=[a,b]", "balance \\['a', 'b'\\]; expected whole numbers.*"),
        (f"{GPT_WORDS} model.heads=3", "model.width is 16, which model.heads=3 does not divide; expected a multiple"),
        (f"{GPT_WORDS} data.path=nowhere", "data.path is 'nowhere', which does not exist; expected a file or .*"),
        (f"{GPT_WORDS} data.path=short.txt", "the training part of short.txt is .* expected at least one window .*"),
        (
            f"{GPT_WORDS} data.context=16",
            "layer embed .* failed on the example batch, .* has 16 tokens per sample; this model has 8 positions",
        ),
        (f"{GPT_WORDS} data.heldout=1", "data.heldout is 1; expected a share of at least 0 and less than 1"),
        (f"{GPT_WORDS} transport.port=-1", "port is -1; expected 0 to 65535"),
        (f"{GPT_WORDS} transport.heartbeat_timeout=0", "heartbeat_timeout is 0 and .*; expected seconds above 0"),
        (f"{GPT_WORDS} cluster.link.latency=-1", "cluster.link.latency is -1; expected seconds from 0 up"),
        (f"{GPT_WORDS} transport.kind=pigeon", "transport is 'pigeon'; expected one of rpc, threads"),
        (f"{GPT_WORDS} output.folder=text.txt", "the run folder text.txt/.* cannot be made: Not a directory"),
        (f"{MLP_WORDS} data=arrays data.path=nowhere.npz", "data.path='nowhere.npz' cannot be read as .*: .+"),
        (f"{MLP_WORDS} data=arrays data.path=broken.npz", "data.path='broken.npz' cannot be read as an .npz file: .+"),
        (f"{MLP_WORDS} data=arrays data.path=half.npz", "half.npz has \\['inputs'\\] and no targets"),
        (f"{MLP_WORDS} data=arrays data.path=wide.npz", "layer stem .* failed on the example batch, .*"),
        (
            f"{MLP_WORDS} data=arrays data.path=labels.npz",
            "the loss failed on the example batch, .*out of bounds.*",
        ),
        (f"{MLP_WORDS} data=text data.path=text.txt data.context=8", "layer stem .* failed on the example batch, .*"),
        (f"{FILE}", "model.factory is 'model.py'; expected path/to/file.py:function or package.module:function"),
        (f"{FILE}:absent", ".*/model.py has no function 'absent'; it has failing, good, nothing, raising, unspl.*"),
        ("model=file model.factory=none.py:build", "model.factory names none.py, which is not a file"),
        (f"{FILE}:nothing", "nothing\\(\\) in .*/model.py returned None; expected \\(model, example_batch, loss\\)"),
        (
            f"{FILE}:unsplittable",
            "2 stages, but the model has 1 layers that can be cut in 0 places; .*",
        ),
        (f"{FILE}:failing", "layer 1 \\(Linear\\) failed on the example batch, .*"),
        (f"{FILE}:raising", "raising\\(\\) failed: .*/model.py:\\d+: OSError: no such weights"),
        (f"{FILE}:good data=arrays data.path=wide.npz", "layer 0 \\(Linear\\) failed on the example batch, .*"),
    ],
)
def test_bad_input_costs_one_line_before_any_process_starts(folder, words, message):
    line = refused(folder, f"train {words}")
    assert re.fullmatch(message, line), line


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_port_in_use_is_refused(folder, command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused(folder, f"{command} {GPT_WORDS} transport.port={port}")
    assert line == f"port {port} cannot be used: Address already in use; expected a free port, or 0 to pick one"
    assert not any((folder / "runs").iterdir())


def test_a_run_folder_that_exists_is_refused(folder):
    (folder / "runs" / "mine").mkdir(parents=True)
    for command in ("train", "compare"):
        line = refused(folder, f"{command} {GPT_WORDS} output.name=mine")
        assert line == "the run folder runs/mine exists already; expected a new output.name"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", f"trian is not a command; expected one of {', '.join(_COMMANDS)}"),
        (
            "simulate --fast",
            "--fast is not an option of simulate; expected --config-dir or overrides such as model=mlp",
        ),
        (
            "simulate schedule=1f1",
            "schedule=1f1 is unknown; did you mean 1f1b? expected one of 1f1b, fill_drain, gpipe",
        ),
        ("compare -m", "compare takes lists as they are, partition=uniform,optimal; expected no -m"),
        ("compare --multirun a=1", "compare takes lists as they are, partition=uniform,optimal; expected no -m"),
        ("view nowhere", "nowhere does not exist; expected a run or a folder of runs"),
    ],
)
def test_other_commands_refuse_in_one_line_too(folder, words, message):
    assert refused(folder, words) == message


def test_wrong_words_are_found_before_torch_is_imported():
    code = (
        "import sys\nfrom modelpar.cli import main\n"
        "try: main(['train', 'training.stepz=1'])\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "2 False"


def test_help_lists_the_commands():
    for words, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        outcome = call(*words)
        assert outcome.code == code
        assert all(f"  {name} " in outcome.out for name in ("train", "simulate", "compare", "verify", "view"))


@pytest.mark.parametrize("command", ["train", "simulate", "compare", "verify"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_the_help_of_a_command_lists_groups_choices_options_and_examples(command, flag):
    outcome = call(command, "model=mlp", flag)
    assert (outcome.code, outcome.err) == (0, "")
    for group in configs.GROUPS:
        [line] = [line for line in outcome.out.splitlines() if line.startswith(f"  {group} ")]
        assert line.split()[1:] == ", ".join(configs.choices(group)).split()
    for option in ("num_microbatches: 8", "batch_size: 16", "folder: runs"):
        assert f"    {option}\n" in outcome.out
    assert outcome.out.count(f"  modelpar {command} ") == 2


def test_the_help_of_view_has_two_examples():
    outcome = call("view", "--help")
    assert outcome.code == 0
    assert "--port" in outcome.out
    assert outcome.out.count("  modelpar view ") == 2
    assert call("view").code == 2


TAKE_OVERRIDES = [command for command in _COMMANDS if command not in ("view", "explain", "report")]


@pytest.mark.parametrize("example", [line for command in TAKE_OVERRIDES for line in _EXAMPLES[command]])
def test_the_examples_in_the_help_are_right(example):
    _, command, *words = example.split()
    for which in (0, -1):
        configs.load(command, [choices[which] for choices in configs.parse_lists(words)])


def test_the_command_is_installed_under_its_name():
    [script] = entry_points(group="console_scripts", name="modelpar") or [None]
    if script is None:
        pytest.skip("modelpar is not installed")
    assert script.load() is main


def test_cfg_prints_the_configuration_and_does_nothing_else(folder):
    outcome = call("train", *GPT, "--cfg", "job")
    assert (outcome.code, outcome.err) == (0, "")
    assert OmegaConf.create(outcome.out).model == configs.load("train", GPT).model
    assert not (folder / "runs").exists()


def test_multirun_makes_a_run_each_and_leaves_nothing_else(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    few = ["training.steps=2", "training.batch_size=4", "training.eval_samples=4", "pipeline.num_microbatches=2"]
    command = Command(tmp_path, "train", "-m", *GPT, *THREADS, *few, "schedule=gpipe,1f1b", "output.folder=out")
    outcome = command.outcome()
    assert (outcome.code, outcome.err) == (0, "")
    assert listing(tmp_path) == {"text.txt", "out"}
    runs = sorted(path.name.rpartition("-")[2] for path in (tmp_path / "out").iterdir())
    assert runs == ["1f1b", "gpipe"]
    for run in (tmp_path / "out").iterdir():
        assert listing(run) == {"config.yaml", "plan.json", "result.json", "weights.safetensors", "events"}
        schedule = OmegaConf.load(run / "config.yaml").schedule._target_
        assert schedule.endswith("gpipe" if run.name.endswith("gpipe") else "one_f_one_b")
