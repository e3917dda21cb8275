#!/usr/bin/env bash
# Library: megatron-core 0.16.1 (torch 2.13.0, Python 3.11); 0.19.2 does the same.
# Behavior: OptimizerParamScheduler.load_state_dict adds the saved number of steps to the present
#     one. Back from step 20 to a state of step 5, the scheduler stands at step 25.
# Surprise: load_state_dict of torch's schedulers (and of everything else in a checkpoint) replaces
#     the state. Going back to an earlier checkpoint within a process, as after a loss spike,
#     continues with a later learning rate than either point had, without a word.
# Seen: megatron-core 0.16.1: saved at step 5 (lr 0.95), loaded at step 20 (lr 0.8):
#     step 25 (lr 0.75); torch's LambdaLR: step 5
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q megatron-core==0.16.1 torch==2.13.0 numpy==2.4.6

CUDA_VISIBLE_DEVICES='' "$work/venv/bin/python" -W ignore - << 'EOF'
from importlib.metadata import version

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


optimizer = make_optimizer()
scheduler = OptimizerParamScheduler(
    optimizer,
    init_lr=0.0,
    max_lr=1.0,
    min_lr=0.0,
    lr_warmup_steps=0,
    lr_decay_steps=100,
    lr_decay_style="linear",
    start_wd=0.0,
    end_wd=0.0,
    wd_incr_steps=100,
    wd_incr_style="constant",
    use_checkpoint_opt_param_scheduler=True,
)


def point():
    return f"step {scheduler.num_steps} (lr {optimizer.param_groups[0]['lr']:g})"


scheduler.step(5)
saved, state = point(), dict(scheduler.state_dict())
scheduler.step(15)
left = point()
scheduler.load_state_dict(state)

reference = LambdaLR(make_optimizer(), lambda step: 1 - step / 100)
for step in range(20):
    if step == 5:
        reference_state = reference.state_dict()
    reference.optimizer.step()
    reference.step()
reference.load_state_dict(reference_state)

print(
    f"megatron-core {version('megatron-core')}: saved at {saved}, loaded at {left}: {point()}; "
    f"torch's LambdaLR: step {reference.last_epoch}"
)
assert reference.last_epoch == 5
assert state["num_steps"] == 5
assert scheduler.num_steps == 25, "the behavior has changed: loading no longer adds the steps"
EOF
