#!/usr/bin/env bash
# Pretrain on this machine: one rank per GPU, or two ranks if there is none.
#
#   launch/local.sh configs/demo.yaml [key=value ...]        RANKS=4 launch/local.sh ... sets their number
set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 2))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
exec python -m largescale.distributed.start_ranks --standalone --nproc-per-node="$ranks" -m largescale pretrain "$@"
