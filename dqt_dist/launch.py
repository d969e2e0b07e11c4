"""Finds the rank of this process and the address of rank 0, from the environment, before torch is imported.

Whatever started the processes, training sees one set of variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. torch.distributed (`env://`) and DeepSpeed read these variables. `discover` finds the
values: the first line of the table that applies decides. `export` writes the values to the environment.

    found in the environment              started by            rank from           rank 0 is met at
    RANK and WORLD_SIZE                   torchrun, deepspeed   those               MASTER_ADDR, MASTER_PORT
    OMPI_COMM_WORLD_SIZE, MPI_LOCALNRANKS mpirun                mpi4py              broadcast by rank 0
    SLURM_STEP_NUM_TASKS                  srun                  SLURM_PROCID        first host, port from the job's id
    PMIX_RANK, PMI_RANK                   another MPI launcher  mpi4py              broadcast by rank 0
    none of these                         a shell               0 of 1              this machine, a free port

mpirun comes before srun because inside a SLURM job mpirun starts its daemons through srun, and srun's variables reach
the ranks. SLURM_STEP_NUM_TASKS distinguishes a task of srun from the batch script, which also has SLURM_PROCID. Under
mpirun and srun a MASTER_ADDR or MASTER_PORT that is already set wins. A site needs this when the address chosen here
cannot be reached.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dqt_dist.errors import SpokenError, UserError

LOOPBACK = "127.0.0.1"
FIRST_PORT, NUM_PORTS = 20000, 10000
"""Ports derived from a SLURM job. They lie below 32768, where the ports begin that Linux assigns by itself."""

SECONDS_FOR_OTHER_RANKS = 3
"""The time by which one rank may find an error later than another, when all ranks find it."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine, which is also the number of the GPU."""
    local_world_size: int
    launcher: str
    """What started this process, for messages: deepspeed, torchrun, mpirun, srun, none."""
    master_address: str
    master_port: int


def discover() -> Launch:
    """Finds the place of this process. Under mpirun this is a collective call that every rank must make.

    Raises `UserError` when the environment names a launcher, or a number of processes, and a variable that belongs to
    it is missing or malformed.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torch_variables(env)
    if under_mpirun():
        return _from_mpi(env)
    if "SLURM_STEP_NUM_TASKS" in env:
        return _from_srun(env)
    if "PMIX_RANK" in env or "PMI_RANK" in env:
        return _from_mpi(env)
    if env.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"environment: RANK is not set, though WORLD_SIZE = {env['WORLD_SIZE']} is; start through a launcher, or "
            f"unset WORLD_SIZE (--dry-run --world-size plans for a number of processes)"
        )
    return Launch(0, 1, 0, 1, "none", LOOPBACK, _free_port())


def under_mpirun() -> bool:
    """Whether mpirun of Open MPI or of MPICH's family started this process."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "MPI_LOCALNRANKS" in os.environ


def mpi() -> Any:
    """mpi4py's MPI, which is started by the import. Raises UserError where no library is found."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py does not work here: {error}; load the module of this mpirun's MPI, "
            f"or put its library on LD_LIBRARY_PATH; a machine without MPI gets one by pip install 'dqt_dist[mpi]'"
        ) from error
    return MPI


def export(launch: Launch) -> None:
    """Writes the environment variables that must be set before torch is imported.

    These are the variables of `env://` rendezvous and, unless it is set already, OMP_NUM_THREADS: an equal share of the
    machine's cores, or the number of cores that this process is bound to (by srun or mpirun) when these are fewer.
    """
    os.environ.update(
        RANK=str(launch.rank),
        WORLD_SIZE=str(launch.world_size),
        LOCAL_RANK=str(launch.local_rank),
        LOCAL_WORLD_SIZE=str(launch.local_world_size),
        MASTER_ADDR=launch.master_address,
        MASTER_PORT=str(launch.master_port),
    )
    fair_part = (os.cpu_count() or 1) // launch.local_world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(fair_part, len(os.sched_getaffinity(0))))))


def leave_warnings_to_first_rank(launch: Launch) -> None:
    """Keeps the other ranks from repeating what libraries warn of: all ranks run the same code.

    Whoever asks for warnings (python -W, PYTHONWARNINGS) gets those of every rank. Errors are shown in any case.
    """
    if launch.rank > 0 and not sys.warnoptions:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)


def check_gpus(launch: Launch, visible: int) -> None:
    """Raises UserError where this machine has more processes of the run than GPUs that one of them sees."""
    if launch.local_world_size <= visible:
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "is not set")
    raise UserError(
        f"{launch.local_world_size} processes on {socket.gethostname()}, but this process sees {visible} GPU(s)"
        f" (CUDA_VISIBLE_DEVICES: {shown}); start {visible}, let every process see all GPUs of the node, or train on"
        " the CPU with DS_ACCELERATOR=cpu",
        local=launch.local_rank == 0,
    )


def report(error: SpokenError, launch: Launch | None) -> int:
    """Prints the message on rank 0, and for a local error also on the rank that raised it. Returns the exit code.

    Launchers send SIGTERM to the other ranks when one rank exits. Rank 0 may not have printed by then, and a rank that
    still starts dies with 143. srun returns the highest exit code of all ranks. So each rank stays until the others
    have found the error too, and its exit code is safe from SIGTERM.
    """
    if launch is None or launch.rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    elif error.local:
        print(f"error on rank {launch.rank}: {error}", file=sys.stderr, flush=True)
    if launch is not None and launch.world_size > 1 and not error.local:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(SECONDS_FOR_OTHER_RANKS)
    return error.exit_code


# ---- torchrun and deepspeed ----


def _from_torch_variables(env: Mapping[str, str]) -> Launch:
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_RANK" in env else "environment"
    # deepspeed sets LOCAL_SIZE where torchrun sets LOCAL_WORLD_SIZE.
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"
    world_size = _integer(env, "WORLD_SIZE", POSITIVE)
    local_world_size = _integer(env, local_size, POSITIVE) if local_size in env else world_size
    return Launch(
        rank=_integer(env, "RANK", range(world_size)),
        world_size=world_size,
        local_rank=_integer(env, "LOCAL_RANK", range(local_world_size)),
        local_world_size=local_world_size,
        launcher=launcher,
        master_address=_text(env, "MASTER_ADDR"),
        master_port=_integer(env, "MASTER_PORT", PORTS),
    )


# ---- mpirun ----


def _from_mpi(env: Mapping[str, str]) -> Launch:
    MPI = mpi()
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = node.size == world.size
    rank, world_size, local_rank, local_world_size = world.rank, world.size, node.rank, node.size
    meeting_point = None
    if rank == 0:
        port = _integer(env, "MASTER_PORT", PORTS) if "MASTER_PORT" in env else _free_port()
        meeting_point = env.get("MASTER_ADDR") or (LOOPBACK if one_node else _address_of_this_machine()), port
    address, port = world.bcast(meeting_point, root=0)
    # MPI is not needed any more. If MPI_Finalize ran at the end of the process, a rank that fails would wait for the
    # other ranks there, while the other ranks wait for the failed rank in a collective of torch.
    node.Free()
    MPI.Finalize()
    return Launch(rank, world_size, local_rank, local_world_size, "mpirun", address, port)


def _address_of_this_machine() -> str:
    """The address of this machine for others: that of the interface with the default route, or the host name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation address: connecting a UDP socket sends nothing
            return probe.getsockname()[0]
        except OSError:
            return socket.gethostname()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


# ---- srun ----


def _from_srun(env: Mapping[str, str]) -> Launch:
    world_size = _integer(env, "SLURM_STEP_NUM_TASKS", POSITIVE)
    tasks_per_node = expand_tasks_per_node(_text(env, "SLURM_STEP_TASKS_PER_NODE"))
    nodes = _text(env, "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST")
    # Steps of one job may run at the same time, so the port depends on the step too. Every rank of a step computes the
    # same port.
    port = FIRST_PORT + (16 * _integer(env, "SLURM_JOB_ID") + _integer(env, "SLURM_STEP_ID")) % NUM_PORTS
    address = env.get("MASTER_ADDR") or (LOOPBACK if len(tasks_per_node) == 1 else _hostnames(nodes)[0])
    local_world_size = tasks_per_node[_integer(env, "SLURM_NODEID", range(len(tasks_per_node)))]
    return Launch(
        rank=_integer(env, "SLURM_PROCID", range(world_size)),
        world_size=world_size,
        local_rank=_integer(env, "SLURM_LOCALID", range(local_world_size)),
        local_world_size=local_world_size,
        launcher="srun",
        master_address=address,
        master_port=_integer(env, "MASTER_PORT", PORTS) if "MASTER_PORT" in env else port,
    )


def expand_tasks_per_node(text: str) -> list[int]:
    """Expands SLURM's run-length form to one number per node: "2(x3),1" is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE: {text!r} is not of SLURM's form, such as 2(x3),1")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def _hostnames(nodelist: str) -> list[str]:
    if shutil.which("scontrol"):
        shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True)
        if shown.returncode == 0 and shown.stdout.split():
            return shown.stdout.split()
    return expand_nodelist(nodelist)  # inside a container, SLURM's commands are often missing


def expand_nodelist(nodelist: str) -> list[str]:
    """Expands SLURM's bracket form: "a[01-03,7],b" is a01, a02, a03, a7, b. Several brackets give all combinations."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        hosts += _expand_host(part)
    if not hosts:
        raise UserError(f"SLURM node list: {nodelist!r} names no host")
    return hosts


def _expand_host(text: str) -> list[str]:
    match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", text)
    if not match:
        return [text]
    prefix, ranges, suffix = match.groups()
    return [prefix + number + rest for number in _expand_ranges(ranges) for rest in _expand_host(suffix)]


def _expand_ranges(ranges: str) -> list[str]:
    """ "01-03,7" is 01, 02, 03, 7. Numbers have the width of the first number of their range."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


# ---- reading variables ----

POSITIVE, PORTS = range(1, 1 << 31), range(1, 1 << 16)


def _text(env: Mapping[str, str], name: str) -> str:
    text = env.get(name)
    if not text:
        raise UserError(f"environment: {name} is not set, though its companions are; start through a launcher")
    return text


def _integer(env: Mapping[str, str], name: str, allowed: range = range(1 << 31)) -> int:
    text = _text(env, name)
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value not in allowed:
        raise UserError(f"environment: {name} = {text!r} is not an integer from {allowed[0]} to {allowed[-1]}")
    return value
