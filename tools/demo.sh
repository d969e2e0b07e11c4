#!/usr/bin/env bash
# The demo of the README: real text that is already on the machine, a ternary LLaMA over 4 CPU processes, a report.
set -euo pipefail
cd "$(dirname "$0")/.."
python tools/prepare_data.py --input python-docs --vocab-size 4096 --valid-fraction 0.05 --output data/demo --force
# Four processes share the cores: one thread each, or they wait for one another.
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
deepspeed --quiet --num_gpus 4 launchers/pretrain.py --config configs/demo_cpu.json --resume none "$@"
