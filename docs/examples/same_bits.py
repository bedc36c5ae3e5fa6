"""Trains a model split over two processes and the same model in plain PyTorch, and compares the weights bit by bit."""

import copy
from functools import partial

import torch
from torch import nn

from modelpar import Objective, Pipeline, plan

MICROBATCHES = 4

torch.set_num_threads(1)  # as many as each rank gets below: the number of threads can change the last bits
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
plain = copy.deepcopy(model)
loss = nn.functional.cross_entropy
make_optimizer = partial(torch.optim.AdamW, lr=1e-3)
batches = [(torch.randn(32, 16), torch.randint(4, (32,))) for _ in range(5)]

decided = plan(Objective(model, loss), batches[0], num_ranks=2, num_microbatches=MICROBATCHES, num_threads=1)
with Pipeline(Objective(model, loss), decided, optimizer=make_optimizer, max_norm=1.0) as pipeline:
    for batch in batches:
        result = pipeline.step(batch)
        print(f"step {result.step}: loss {result.loss:.6f}, gradient norm {result.grad_norm:.6f}")
    split_weights = pipeline.state_dict()

optimizer = make_optimizer(plain.parameters())
for inputs, targets in batches:
    for x, y in zip(inputs.tensor_split(MICROBATCHES), targets.tensor_split(MICROBATCHES), strict=True):
        (loss(plain(x), y) * len(x)).backward()  # a sum over samples
    for parameter in plain.parameters():
        parameter.grad.div_(len(inputs))  # divided once, as every stage does
    nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()

same = all(torch.equal(split_weights[name], value) for name, value in plain.state_dict().items())
print(f"the weights are {'equal to the bit' if same else 'different'}")
