"""A SLURM cluster of several nodes on this machine: SLURM's own daemons, for tests and to try a batch script.

    python -m tests.launchers.slurm_cluster --nodes 2 bash     # a shell in which sinfo, sbatch, srun ... work

Everything is in one folder: the configuration, munge's key and socket, states and logs. No system service is needed,
none is disturbed, and several clusters do not meet, because each has its own ports. All daemons run as the user who
starts them, and so do the jobs. `make setup-slurm` installs SLURM where there is apt-get.

A node is a slurmd of its own. Its name is an address of the loopback, 127.0.0.1 and up, so that ranks of two nodes meet
at the name of the first as they do on a cluster. What is not real: the nodes share one machine's disk, cores and memory
(each says that it has as many cores as it is asked for), and the GPUs are numbers without a device.
"""

from __future__ import annotations

import argparse
import getpass
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
"""Where the daemons are looked for: users often have no sbin in their PATH."""

START_SECONDS = 120.0
STOP_SECONDS = 30.0

# cons_tres counts cores and GPUs. A job in `urgent` takes the nodes of one in `main`, which goes back to the queue at
# the latest after GraceTime seconds. SchedulerParameters let a job start when it can, and not some seconds later.
CONFIGURATION = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={name} Port={port} CPUs={cpus} Gres=gpu:{gpus}"


def missing_daemons() -> list[str]:
    """The programs that a cluster needs and this machine lacks."""
    return [name for name in DAEMONS if shutil.which(name, path=PROGRAMS) is None]


needs_slurm = pytest.mark.skipif(
    bool(missing_daemons()), reason=f"SLURM is missing ({', '.join(missing_daemons())} not found): make setup-slurm"
)


class SlurmCluster:
    """The cluster, up from entry to exit of the `with` block. `folder` must be there, and is left with the logs.

    On exit jobs are cancelled, and the daemons end. Raises RuntimeError when the nodes are not idle in time.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, cpus: int = 8, gpus: int = 8) -> None:
        self.folder = folder
        self.nodes = [f"127.0.0.{number}" for number in range(1, num_nodes + 1)]
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PROGRAMS}
        """What a command of SLURM needs to speak to this cluster."""
        self.environment = os.environ | self.variables
        self._daemons = ExitStack()
        self._cpus, self._gpus = cpus, gpus

    def __enter__(self) -> SlurmCluster:
        self._configure()
        with ExitStack() as started:
            self._daemons = started
            munged = ("munged", "--foreground", "--force")  # force: the folder may be closed to other users
            files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            self._start(*munged, *(f"--{option}={self.folder}/munge.{end}" for option, end in files.items()))
            self.wait_until(lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            for node in self.nodes:
                self._start("slurmd", "-D", "-N", node)
            self.wait_until(self.is_idle)
            started.callback(self._end_jobs)
            self._daemons = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._daemons.close()

    def run(self, *command: str) -> str:
        """The output of a command of SLURM. Raises CalledProcessError when it fails."""
        done = subprocess.run(
            command, env=self.environment, check=True, stdout=subprocess.PIPE, text=True, timeout=STOP_SECONDS
        )
        return done.stdout.strip()

    def _configure(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller, *ports = _free_ports(1 + len(self.nodes))
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=self._cpus, gpus=self._gpus)
            for name, port in zip(self.nodes, ports, strict=True)
        ]
        text = CONFIGURATION.format(
            host=host, port=controller, user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(text)
        devices = [self.folder / f"gpu{number}" for number in range(self._gpus)]
        for device in devices:  # SLURM wants to see a device file for each
            device.symlink_to("/dev/null")
        (self.folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
        (self.folder / "state").mkdir()
        for node in self.nodes:
            (self.folder / node).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _start(self, *command: str) -> None:
        """Starts a daemon, which ends with the cluster."""
        log = self._daemons.enter_context((self.folder / "daemons.log").open("ab"))
        process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def end() -> None:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

        self._daemons.callback(end)

    def is_idle(self) -> bool:
        """All nodes are up and free."""
        sinfo = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
        shown = subprocess.run(sinfo, env=self.environment, capture_output=True, text=True, timeout=STOP_SECONDS)
        return shown.stdout.split() == ["idle"] * len(self.nodes)

    def _end_jobs(self) -> None:
        self.run("scancel", f"--user={getpass.getuser()}")
        self.wait_until(lambda: not self.run("squeue", "--noheader"))

    def wait_until(self, reached: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Returns when reached() is true. Raises RuntimeError, with the end of the daemons' logs, if it is not in
        time."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                logs = sorted(self.folder.glob("*.log"))
                ends = (f"{log.name}:\n{log.read_text(errors='replace')[-2000:]}" for log in logs)
                raise RuntimeError(f"SLURM in {self.folder}: not after {seconds:.0f} s\n" + "\n".join(ends))
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as open_until_all_are_known:
        probes = [open_until_all_are_known.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=8, help="cores of a node, real or not (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node, as numbers (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="an empty folder for the logs (default: a temporary one)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what runs in the cluster, which ends with it")
    args = parser.parse_args(argv)
    if missing := missing_daemons():
        parser.error(f"{', '.join(missing)} not found; on Debian: make setup-slurm")
    if not args.command:
        parser.error("name a command to run in the cluster, such as bash")
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
        cluster = stack.enter_context(SlurmCluster(folder.absolute(), args.nodes, args.cpus, args.gpus))
        return subprocess.run(args.command, env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
