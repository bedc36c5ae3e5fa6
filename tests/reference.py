"""The unsplit model in one process: what every pipeline must equal to the bit. Kept short, to be read and believed."""

from collections import Counter
from contextlib import contextmanager

import torch
from torch import nn

from modelpar.run.rng import random_key


def train(model, loss, optimizer, batches, *, num_microbatches, max_norm=None, seed=0, lr_schedule=None, draws=()):
    """Trains the untouched module on batches; yields (loss, gradient norm, gradients by name) after each step."""
    optimizer = optimizer(list(model.named_parameters()))
    lr_schedule = lr_schedule and lr_schedule(optimizer)
    for step, (inputs, targets) in enumerate(batches):
        cuts = min(len(inputs), num_microbatches)
        total, count = None, 0
        pairs = zip(inputs.tensor_split(cuts), targets.tensor_split(cuts), strict=True)
        for microbatch, (x, y) in enumerate(pairs):
            with keyed(model, draws, seed, step, microbatch):
                part = loss(model(x), y) * len(x)
            part.backward()
            total = part.detach() if total is None else total + part.detach()
            count += len(x)
        parameters = [p for p in model.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad.div_(count)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"))
        if max_norm is None:  # clip_grad_norm_ has multiplied by 1
            assert all(torch.equal(gradients[n], p.grad) for n, p in model.named_parameters() if n in gradients)
        optimizer.step()
        optimizer.zero_grad()
        if lr_schedule:
            lr_schedule.step()
        yield float(total / count), float(norm), gradients


@contextmanager
def keyed(model, draws, seed, step, microbatch):
    """Seeds each call of the modules named in draws, as the pipeline does, and restores the generators."""
    calls, saved = Counter(), []
    generators = torch.default_generator, *torch.cuda.default_generators  # the latter only where CUDA is in use

    def before(name):
        def hook(*_):
            saved.append([generator.get_state() for generator in generators])
            for generator in generators:
                generator.manual_seed(random_key(seed, step, microbatch, name, calls[name]))
            calls[name] += 1

        return hook

    def restore(*_):
        for generator, state in zip(generators, saved.pop(), strict=True):
            generator.set_state(state)

    handles = [model.get_submodule(name).register_forward_pre_hook(before(name)) for name in draws]
    handles += [model.get_submodule(name).register_forward_hook(restore) for name in draws]
    yield
    for handle in handles:
        handle.remove()
