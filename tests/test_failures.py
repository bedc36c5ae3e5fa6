"""What users get when something goes wrong: the cause, at once, and nothing left behind."""

import json
import signal
import socket
import threading
import time
from functools import partial
from pathlib import Path
from textwrap import dedent

import pytest
import torch
import torch.nn.functional as F
from failing import exists, runs, task
from layers import LARGE, FailingBackward, Nest, Trip, adamw, fail, momentum, refuse_connection
from torch import nn
from unsplit import make_plan

from modelpar.capture.objective import LossResult, Objective
from modelpar.errors import CaptureError, ConfigError, StageError, StepTimeout
from modelpar.planning import partitioners
from modelpar.run.pipeline import Pipeline
from modelpar.run.rpc import listen
from modelpar.run.workers import Workers

FAILING = Path(__file__).with_name("failing.py")

PRELUDE = dedent("""
    import sys, threading
    import torch, torch.nn.functional as F
    from torch import nn
    from modelpar import Objective, Pipeline, Workers
    from unsplit import make_plan

    class Mine(nn.Module):
        '''A class of the script itself, as in a notebook cell.'''
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(width, width)
        def forward(self, x):
            return helper(self.linear(x))

    def helper(x):
        return torch.tanh(x) * FACTOR

    FACTOR = 0.5

    def build():
        return nn.Sequential(Mine(6), Mine(6), nn.Linear(6, 3))

    def loss(output, targets):
        return F.cross_entropy(output, targets)

    def optimizer(parameters):
        return torch.optim.SGD(parameters, lr=LR)

    LR = 0.1
    torch.set_num_threads(1)
    batch = (torch.ones(8, 6), torch.zeros(8, dtype=torch.int64))
    objective = Objective(build, loss)
    plan = make_plan(objective, batch)
""")

ENDLESS = """
with Workers(2) as workers, Pipeline(objective, plan, workers=workers, optimizer=optimizer) as pipeline:
    print(*(workers._launch.pid(rank) for rank in range(2)), flush=True)
    for i, result in enumerate(pipeline.steps(iter(lambda: batch, None))):
        if i == 2:
            print("runs", flush=True)
"""

MAIN = """
from modelpar.errors import ConfigError, RunError

with Pipeline(objective, plan, optimizer=optimizer) as pipeline:
    losses = [pipeline.step(batch).loss for _ in range(3)]
    state = pipeline.state_dict()
    try:
        Workers(1).__enter__()
    except RunError as error:
        print(error)
assert threading.active_count() == 1, threading.enumerate()

model = objective.build(0)
assert list(state) == list(model.state_dict())
opt = optimizer(model.parameters())
for found in losses:
    opt.zero_grad()
    total = loss(model(batch[0]), batch[1])
    total.backward()
    opt.step()
    assert abs(found - total.item()) < 1e-6
assert all(torch.allclose(state[name], value) for name, value in model.state_dict().items())

with Workers(2) as workers, Pipeline(objective, plan, workers=workers, optimizer=optimizer) as pipeline:
    print(*(workers._launch.pid(rank) for rank in range(2)), flush=True)
    assert pipeline.step(batch).loss == losses[0]
    raise LookupError("the user's own mistake")
"""


def wait_gone(pids, seconds, there=exists):
    """Waits until processes are no longer there; returns those that still are."""
    deadline, idle = time.monotonic() + seconds, threading.Event()
    while (left := [pid for pid in pids if there(pid)]) and time.monotonic() < deadline:
        idle.wait(0.01)
    return left


def wait_threads_gone(seconds=2):
    """Waits until the threads that modelpar started have ended; returns those that have not."""
    deadline = time.monotonic() + seconds
    ours = [thread for thread in threading.enumerate() if thread.name.startswith("modelpar-")]
    for thread in ours:
        thread.join(max(0, deadline - time.monotonic()))
    return [thread.name for thread in ours if thread.is_alive()]


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(start_script):
    """Starts all scripts of this file at once."""
    return {
        "failing": start_script(FAILING.read_text()),
        "interrupted": start_script(PRELUDE + ENDLESS),
        "main": start_script(PRELUDE + MAIN),
        "orphaned": start_script(PRELUDE + ENDLESS),
    }


@pytest.fixture(scope="module")
def outcomes(scripts):
    """Returns what failing.py reports, by name."""
    out, err = scripts["failing"].communicate(timeout=100)
    assert scripts["failing"].returncode == 0, err
    assert err == ""  # no noise of closed connections
    return {line["name"]: line for line in map(json.loads, out.splitlines())}


def wait_running(process):
    """Waits until an endless script trains; returns the process ids of its workers."""
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert process.stdout.readline() == "runs\n", process.stderr.read()
    assert len(pids) == 2
    assert all(map(exists, pids))
    return pids


def test_ctrl_c_ends_everything(scripts):
    process = scripts["interrupted"]
    pids = wait_running(process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert wait_gone(pids, 0.5) == []
    assert process.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert err.count("Traceback") == 1


def test_workers_do_not_outlive_a_killed_controller(scripts):
    process = scripts["orphaned"]
    pids = wait_running(process)
    process.kill()
    assert wait_gone(pids, 2, there=runs) == []  # their parent is gone: the system reaps them when it gets to it
    assert process.communicate()[1] == ""


def test_classes_and_functions_of_a_script_and_its_own_exceptions(scripts):
    process = scripts["main"]
    out, err = process.communicate(timeout=100)
    second, pids = out.splitlines()
    assert second.startswith("this process already has workers over RPC; expected one `Workers` at a time")
    assert process.returncode == 1
    assert err.splitlines()[-1] == "LookupError: the user's own mistake"
    assert err.count("Traceback") == 1
    assert wait_gone(map(int, pids.split()), 0.5) == []


def test_an_exception_in_a_layer_of_another_process(outcomes):
    found = outcomes["exception"]
    first, *rest = found["message"].splitlines()
    assert found["error"] == "StageError"
    where = "rank 1 failed (stage 1, layer 2.body.1, action 1F2, micro-batch 2, input shapes [2, 8] [2])"
    assert first == f"{where}: ZeroDivisionError: this layer divides by zero"
    assert rest[1] == "Traceback (most recent call last):"
    assert rest[-2].strip() == 'raise ZeroDivisionError("this layer divides by zero")'
    assert rest[-1] == "ZeroDivisionError: this layer divides by zero"
    assert found["seconds"] < 2


def test_a_killed_process(outcomes):
    found = outcomes["killed"]
    assert found["error"] == "WorkerLost"
    assert found["message"].startswith("the process of rank 1 was ended by SIGKILL; it last said that it ")
    assert found["seconds"] < 2


def test_a_stopped_process(outcomes):
    found = outcomes["stopped"]
    assert found["error"] == "WorkerLost"
    assert found["message"].startswith("rank 1 has been silent for ")
    assert " s, more than heartbeat_timeout = 1 s; it last said that it " in found["message"]
    assert 0.5 < found["seconds"] < 3


def test_a_step_that_hangs_says_what_every_rank_waits_for(outcomes):
    found = outcomes["hung"]
    assert found["error"] == "StepTimeout"
    assert found["message"] == (
        "no reply after step_timeout = 2 s: rank 0 has 0B2 pending and waits for grad 0 of micro-batch 2 from stage 1; "
        "rank 1 runs 1F2"
    )
    assert 2 <= found["seconds"] < 4


@pytest.mark.parametrize("name", ["exception", "killed", "stopped", "hung"])
def test_after_a_failure_no_process_is_left_and_the_cause_stays(outcomes, name):
    found = outcomes[name]
    assert found["left"] == []
    assert wait_gone(found["pids"], 0) == []
    assert found["same again"] is True
    assert len(found["losses"]) == 2  # the steps before it were given
    assert outcomes["end"]["children"].split() == []


def test_a_port_in_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port {port} cannot be used: Address already in use; expected a free"):
            listen(port)


# --- threads: the same messages ---------------------------------------------------------------------------------------


def failing(objective, batches, *, optimizer=adamw, num_ranks=3, error=StageError, split=None, **options):
    """Trains until it fails; returns the first line of the message."""
    split = split or partial(partitioners.manual, balance=[1, 2, 1])
    plan = make_plan(objective, batches[0], num_ranks=num_ranks, partitioner=split)
    with (
        pytest.raises(error) as caught,
        Workers(num_ranks, transport="threads", **options) as workers,
        Pipeline(objective, plan, workers=workers, optimizer=optimizer) as pipeline,
    ):
        list(pipeline.steps(batches))
    return str(caught.value).splitlines()[0]


@pytest.fixture
def no_shared_threads(shared_workers):
    """Ends the shared threads, so that a test can tell its own from them."""
    for shared in shared_workers.values():
        shared.close()
    assert wait_threads_gone() == []


@pytest.mark.usefixtures("no_shared_threads")
def test_an_exception_in_a_layer_of_a_thread():
    objective, good, bad = task(fail)
    where = "rank 1 failed (stage 1, layer 2.body.1, action 1F2, micro-batch 2, input shapes [2, 8])"
    assert failing(objective, [good, bad]) == f"{where}: ZeroDivisionError: this layer divides by zero"
    assert wait_threads_gone() == []


def test_an_exception_of_a_layer_that_looks_like_a_lost_connection():
    objective, good, bad = task(refuse_connection)
    assert failing(objective, [good, bad]).endswith("ConnectionRefusedError: the user's own database is down")


def test_an_exception_in_the_loss():
    objective, good, bad = task(nn.Identity())

    def loss(output, targets):
        if bool((targets == 99).any()):
            raise OverflowError("too much loss")
        return F.cross_entropy(output, targets)

    bad[1][1] = 99
    message = failing(Objective(objective.model, loss), [good, bad])
    where = "rank 2 failed (stage 2, layer the loss, action 2F0, micro-batch 0, input shapes [2, 8] [2])"
    assert message == f"{where}: OverflowError: too much loss"


def test_a_loss_of_the_wrong_shape():
    objective, good, bad = task(nn.Identity())

    def loss(output, targets):
        return F.cross_entropy(output, targets, reduction="none" if bool((targets == 2).all()) else "mean")

    bad[1].fill_(2)
    message = failing(Objective(objective.model, loss), [good, bad])
    assert message.endswith(
        "CaptureError: the loss is a tensor of shape [2]; expected a scalar tensor, the mean over samples"
    )
    with pytest.raises(CaptureError, match=r"the loss is a tensor of shape \[2\]; expected a scalar tensor"):
        make_plan(Objective(objective.model, loss), bad)


def test_an_exception_in_backward():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), Trip(FailingBackward.apply), nn.Linear(6, 6), nn.Linear(6, 3))
    model.insert(0, nn.Linear(6, 6))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
    good = (torch.randn(8, 6), torch.randint(3, (8,)))
    bad = (good[0].clone(), good[1])
    bad[0][7] = LARGE * 10
    split = partial(partitioners.manual, balance=[1, 2, 2])
    message = failing(Objective(model, F.cross_entropy), [good, bad], split=split)
    where = "rank 1 failed (stage 1, layer one of 1, 2, action 1B3, micro-batch 3, input shapes [2, 6])"
    assert message == f"{where}: ArithmeticError: no gradient today"


def test_an_optimizer_that_cannot_be_made_on_one_rank():
    objective, good, _ = task(fail)

    def optimizer(parameters):
        if [name for name, _ in parameters] == ["0.weight", "0.bias"]:
            raise LookupError("no optimizer for this stage")
        return adamw(parameters)

    message = failing(objective, [good], optimizer=optimizer, error=ConfigError)
    where = "cannot be used on rank 0, for 0.weight … 0.bias"
    assert message == f"the optimizer or its learning-rate schedule {where}: LookupError: no optimizer for this stage"


def test_an_optimizer_that_cannot_be_made_any_more():
    """What the rehearsal did not see is said by the rank."""
    objective, good, _ = task(fail)

    def optimizer(parameters):
        if threading.current_thread() is not threading.main_thread():
            raise LookupError("no optimizer here")
        return adamw(parameters)

    message = failing(objective, [good], optimizer=optimizer)
    assert message.endswith(" failed: LookupError: no optimizer here")


def test_an_exception_in_the_optimizer():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            parameter = self.param_groups[0]["params"][0]
            if parameter.shape == (3, 8) and parameter.grad is not None:
                raise BufferError("no room")
            return super().step(closure)

    objective, good, _ = task(fail)
    message = failing(objective, [good], optimizer=Broken)
    assert message.startswith("rank 2 failed")
    assert message.endswith("BufferError: no room")


def test_a_step_that_counts_nothing():
    objective, good, _ = task(fail)

    def loss(output, targets):
        return LossResult(F.cross_entropy(output, targets, reduction="sum"), 0)

    message = failing(Objective(objective.model, loss), [good])
    assert "RunError: the loss counted nothing in this step" in message


def test_a_thread_that_hangs():
    released = threading.Event()
    objective, good, bad = task(lambda x: released.wait() and x)
    objective.model[2].body[1] = Waiting(released)
    message = failing(objective, [good, bad], error=StepTimeout, step_timeout=0.5)
    released.set()
    assert message == (
        "no reply after step_timeout = 0.5 s: rank 0 has 0B1 pending and waits for grad 0 of micro-batch 1 from stage "
        "1; rank 1 runs 1F2; rank 2 has 2F2 pending and waits for value 2 of micro-batch 2 from stage 1"
    )


class Waiting(nn.Module):
    """Waits for an event that is not pickled, as it is looked up when it is needed."""

    events: list = []  # noqa: RUF012

    def __init__(self, event):
        super().__init__()
        self.events[:] = [event]

    def forward(self, x):
        if bool((x.abs() > LARGE).any()):
            Waiting.events[0].wait()
        return x * 1


@pytest.mark.usefixtures("no_shared_threads")
def test_an_error_of_the_user_ends_the_threads():
    objective, good, _ = task(fail)
    plan = make_plan(objective, good)
    with (
        pytest.raises(KeyError, match="mine"),
        Workers(2, transport="threads") as workers,
        Pipeline(objective, plan, workers=workers, optimizer=adamw) as pipeline,
    ):
        raise KeyError("mine", pipeline.step(good))
    assert wait_threads_gone() == []


@pytest.mark.parametrize("what", ["layer", "loss", "optimizer"])
def test_what_cannot_be_pickled_is_named(workers, what):
    lock = threading.Lock()

    class Locked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = lock if what == "layer" else None

        def forward(self, x):
            return x * 1

    def loss(output, targets, held=lock if what == "loss" else None):
        return F.cross_entropy(output, targets)

    def optimizer(parameters, held=lock if what == "optimizer" else None):
        return momentum(parameters)

    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    objective = Objective(nn.Sequential(nn.Linear(6, 6), Nest(fail, 6), Locked(), nn.Linear(6, 3)), loss)
    plan = make_plan(objective, batch)
    where = "the plan, the optimizer or the learning-rate schedule" if what == "optimizer" else r"stage 1 \(2 … 3\)"
    with (
        pytest.raises(CaptureError, match=rf"^{where} cannot be sent to the workers: TypeError: .*lock.*, found at .*"),
        Pipeline(objective, plan, workers=workers, optimizer=optimizer),
    ):
        pass
    assert workers._error is None  # they can still be used
