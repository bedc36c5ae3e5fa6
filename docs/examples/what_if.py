"""Asks what a step would cost with other schedules and more micro-batches. Starts no process; only the plan changes."""

import torch
from torch import nn

from modelpar import Objective, plan, schedules
from modelpar.planning.analysis import analyse
from modelpar.planning.simulate import predict
from modelpar.report.text import draw_timeline

model = nn.Sequential(*[nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(12)])
objective = Objective(model, nn.functional.mse_loss)
batch = torch.randn(512, 512), torch.randn(512, 512)

for num_microbatches in (4, 8):
    for schedule in (schedules.gpipe, schedules.one_f_one_b):
        decided = plan(
            objective, batch, num_ranks=4, num_microbatches=num_microbatches, schedule=schedule, profile="flops"
        )
        timeline = predict(decided)
        bubble, peaks = analyse(timeline).bubble, decided.schedule.peak_microbatches()
        print(f"{schedule.__name__:<12} {num_microbatches} micro-batches: bubble {100 * bubble:.0f} %, alive {peaks}")

print()
print(draw_timeline(timeline, 96).plain)
