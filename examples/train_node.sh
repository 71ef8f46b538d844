#!/bin/bash
# One machine with several GPUs: a process for each. Options go on to the run:
#   bash examples/train_node.sh folders --data.image /data/shards/image --out /data/runs/first
set -euo pipefail
exec torchrun --standalone --nproc-per-node "${GPUS:-gpu}" --max-restarts 3 \
  -m uml_fast.train "$@"
