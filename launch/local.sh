#!/usr/bin/env bash
# Pretrain on this machine: one rank per GPU, or two ranks if there is none.
#
#   launch/local.sh configs/demo.yaml [key=value ...]        RANKS=4 launch/local.sh ... sets their number
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
if [ -z "${RANKS:-}" ]; then  # torch counts the GPUs that CUDA_VISIBLE_DEVICES leaves
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    RANKS=$((gpus > 0 ? gpus : 2))
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}
exec python -m largescale.distributed.start_ranks --standalone --nproc-per-node="$RANKS" -m largescale pretrain "$@"
