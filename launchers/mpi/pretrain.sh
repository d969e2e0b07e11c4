#!/bin/bash
# Pre-train on several nodes with mpirun of Open MPI, one process per slot of the hostfile. From the repository's root:
#
#     launchers/mpi/pretrain.sh HOSTFILE configs/1b_ternary.json [--set section.key=value ...]
#
# launchers/mpi/hostfile.example is a hostfile. Every node needs this folder, the environment and the data at the same
# paths, and ssh without a password from the first node. Ranks and the meeting point come from MPI
# (dqt_dist/launch.py). The exit code is that of the run: 75 when a signal stopped and saved it, and the same command
# goes on from there.
#
# Lines marked SITE are yours to set.

set -u

PYTHON=${PYTHON:-python3}  # SITE: or activate an environment here, which must exist on every node
# SITE: the next line is for networks that NCCL or gloo guess wrongly.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

if [[ $# -lt 2 || ! -f $1 || ! -f launchers/pretrain.py ]]; then
    echo "usage, in the repository's root: launchers/mpi/pretrain.sh HOSTFILE CONFIG [arguments of pretrain.py]" >&2
    exit 2
fi
hostfile=$1
config=$2
shift 2
exported=()  # what the ranks of other nodes need of this shell
for name in PATH LD_LIBRARY_PATH PYTHONPATH OMP_NUM_THREADS DS_ACCELERATOR CUDA_DEVICE_MAX_CONNECTIONS TRITON_CACHE_DIR \
    NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME NCCL_DEBUG MASTER_ADDR MASTER_PORT; do
    [[ -n ${!name:-} ]] && exported+=(-x "$name")
done
# Unbound: a rank bound to one core would give its threads and data workers that core alone.
exec mpirun --hostfile "$hostfile" --bind-to none "${exported[@]}" \
    "$PYTHON" -u launchers/pretrain.py --config "$config" --resume auto "$@"
