"""Each launcher's environment gives the same facts, and two real MPI ranks meet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqt_dist import launch as launch_module
from dqt_dist.errors import RunError, UserError
from dqt_dist.launch import Launch, check_gpus, discover, expand_nodelist, expand_tasks_per_node, export, report

ROOT = Path(__file__).resolve().parents[2]
EXPORTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
OTHER_PREFIXES = ("LOCAL_", "SLURM_", "OMPI_", "PMIX_", "PMI_", "MPI_", "TORCHELASTIC_", "CROSS_")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's variables, whatever started the tests; variables that `export` writes are taken back."""
    for name in list(os.environ):
        if name.startswith(OTHER_PREFIXES):
            monkeypatch.delenv(name)
    for name in EXPORTED:
        monkeypatch.setenv(name, "")  # noted by monkeypatch, which then removes at the end what a test exports
        monkeypatch.delenv(name)


def setenv(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
}


def test_a_shell_is_one_process() -> None:
    found = discover()
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (0, 1, 0, 1)
    assert found.launcher == "none" and found.master_address == "127.0.0.1" and 1024 <= found.master_port < 65536


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
    setenv(monkeypatch, **sizes, MASTER_ADDR="a", MASTER_PORT="7", TORCHELASTIC_RUN_ID="x")
    assert discover() == Launch(9, 16, 1, 8, "torchrun", "a", 7)


def test_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8"}
    setenv(monkeypatch, **sizes, MASTER_ADDR="a", MASTER_PORT="7", CROSS_RANK="1", CROSS_SIZE="2")
    assert discover() == Launch(9, 16, 1, 8, "deepspeed", "a", 7)


def test_srun_over_three_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module.shutil, "which", lambda name: None)  # as in a container: no scontrol
    setenv(monkeypatch, **SRUN)
    assert discover() == Launch(5, 6, 1, 2, "srun", "gpu07", 20000 + 16 * 1234 % 10000)


def test_srun_on_one_node_meets_on_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(
        monkeypatch, **SRUN | {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu07"}
    )
    assert (discover().master_address, discover().local_world_size) == ("127.0.0.1", 6)


def test_the_batch_script_of_a_job_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch step has SLURM_PROCID and SLURM_NTASKS but is no srun task. As rank 0 of 8 it would wait for ever."""
    setenv(monkeypatch, SLURM_JOB_ID="1234", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8")
    assert discover().world_size == 1


def test_explicit_ranks_come_before_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun inside an srun task: the variables of torchrun count."""
    setenv(monkeypatch, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="a", MASTER_PORT="7", **SRUN)
    assert discover() == Launch(0, 2, 0, 2, "environment", "a", 7)


def test_a_master_set_by_the_site_wins_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    setenv(monkeypatch, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000", **SRUN)
    assert (discover().master_address, discover().master_port) == ("10.0.0.1", 4000)


def test_steps_side_by_side_do_not_share_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = []
    for step in ("0", "1"):
        setenv(monkeypatch, MASTER_ADDR="a", **SRUN | {"SLURM_STEP_ID": step})
        ports.append(discover().master_port)
    assert ports[0] != ports[1]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK is not set"),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, "RANK = 'zero' is not an integer from 0 to 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = '2' is not an integer from 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE = '0' is not an integer from 1 to"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (SRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT = '99999' is not an integer from 1 to 65535"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID = '3' is not an integer from 0 to 2"),
    ],
)
def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str) -> None:
    setenv(monkeypatch, **variables)
    with pytest.raises(UserError, match=words):
        discover()


def test_export_writes_what_discover_reads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    export(Launch(1, 4, 1, 2, "mpirun", "host", 4000))
    assert discover() == Launch(1, 4, 1, 2, "environment", "host", 4000)
    assert int(os.environ["OMP_NUM_THREADS"]) >= 1


def test_export_leaves_the_users_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "13")
    export(Launch(0, 1, 0, 1, "none", "127.0.0.1", 4000))
    assert os.environ["OMP_NUM_THREADS"] == "13"


# ---- SLURM's short forms ----


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,m2", ["n1", "m2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12]", ["n08", "n09", "n10", "n12"]),
        ("n[1-2]-ib,login", ["n1-ib", "n2-ib", "login"]),
        ("rack[1-2]node[01-02]", ["rack1node01", "rack1node02", "rack2node01", "rack2node02"]),
        ("a-b[3],c[1,2]", ["a-b3", "c1", "c2"]),
    ],
)
def test_nodelist_expands(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text) == hosts


def test_empty_nodelist_is_refused() -> None:
    with pytest.raises(UserError, match="names no host"):
        expand_nodelist("")


@pytest.mark.parametrize(("text", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,8(x2)", [1, 8, 8])])
def test_tasks_per_node_expands(text: str, tasks: list[int]) -> None:
    assert expand_tasks_per_node(text) == tasks


# ---- real processes ----

MEET = """
import json, sys
from dqt_dist.launch import discover, export
launch = discover()
imported_torch = "torch" in sys.modules
export(launch)
import torch, torch.distributed
torch.distributed.init_process_group("gloo", init_method="env://")
total = torch.tensor([launch.rank + 1])
torch.distributed.all_reduce(total)
torch.distributed.destroy_process_group()
facts = dict(rank=launch.rank, local_rank=launch.local_rank, world_size=launch.world_size,
             local_world_size=launch.local_world_size, launcher=launch.launcher, address=launch.master_address)
print(json.dumps(facts | dict(total=total.item(), imported_torch=imported_torch)))
"""


def mpirun(num_ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    beside_python = Path(sys.executable).parent / "mpirun"
    program = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    assert program, "mpirun is missing: pip install -e '.[mpi]', or load the MPI of this machine"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [program, "--allow-run-as-root", "--oversubscribe", "-n", str(num_ranks), *command]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)


def test_two_mpi_ranks_find_each_other() -> None:
    """Under a real mpirun, before torch is imported; then torch.distributed meets through what was exported."""
    done = mpirun(2, sys.executable, "-c", MEET)
    assert done.returncode == 0, done.stderr
    facts = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda fact: fact["rank"])
    for rank, fact in enumerate(facts):
        assert fact == {
            "rank": rank, "local_rank": rank, "world_size": 2, "local_world_size": 2, "launcher": "mpirun",
            "address": "127.0.0.1", "total": 3, "imported_torch": False,
        }  # fmt: skip
    assert len(facts) == 2


def test_wrong_config_under_mpirun_is_printed_once(tmp_path: Path) -> None:
    done = mpirun(2, sys.executable, str(ROOT / "launchers" / "pretrain.py"), "--config", str(tmp_path / "absent.json"))
    assert done.returncode == 2
    assert done.stderr.count("cannot be read: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(("error", "exit_code"), [(UserError("what is wrong"), 2), (RunError("what is wrong"), 1)])
def test_a_message_is_printed_once_and_says_who_is_to_blame(
    error: Exception, exit_code: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 for wrong input, 1 for a failed run. Rank 0 prints the message; the other ranks wait for it."""
    monkeypatch.setattr("dqt_dist.launch.SECONDS_FOR_OTHER_RANKS", 0.0)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the test process keeps its own handlers
    for rank in (0, 1):
        assert report(error, Launch(rank, 2, rank, 2, "tests", "", 0)) == exit_code
    assert capsys.readouterr().err == "error: what is wrong\n"


def test_fewer_gpus_than_processes_is_one_message_of_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for local_rank in (0, 1, 2):
        with pytest.raises(UserError, match=r"3 processes on .* sees 2 GPU\(s\) .*: 0,1\); start 2") as said:
            check_gpus(Launch(3 + local_rank, 6, local_rank, 3, "torchrun", "a", 7), 2)
        assert said.value.local == (local_rank == 0)
    check_gpus(Launch(0, 2, 0, 2, "torchrun", "a", 7), 2)
