"""Submits a run to SLURM, when its layout and batch fit the GPUs that are asked for.

The job is launchers/slurm/pretrain.sbatch of the folder in which this is started, the repository's root, with sbatch's
options for nodes, GPUs and what differs between sites. What is not given here stays as the lines of that script marked
SITE say.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from pathlib import Path

from dqt_dist.command_line import make_parser, positive, run_tool
from dqt_dist.config import SHIPPED, check_world, load_config
from dqt_dist.errors import UserError

EXAMPLES = """\
examples:
  # two nodes with eight GPUs each
  %(prog)s --config configs/1b_ternary.json --nodes 2 --gpus-per-node 8

  # print the command, and submit nothing; needs no SLURM
  %(prog)s --config configs/1b_ternary.json --nodes 2 --gpus-per-node 8 --dry-run

  # where this site wants it, with another learning rate
  %(prog)s --config configs/1b_ternary.json --nodes 4 --gpus-per-node 4 --time 12:00:00 --partition gpu \\
      --account project --set optimizer.learning_rate=5e-4

exit code: 0, or 2 for a wrong config, a layout or batch that the GPUs do not divide, or what sbatch refuses.
"""

SCRIPT = Path("launchers/slurm/pretrain.sbatch")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("dqt-submit", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help=f"JSON file of the run, as those in {SHIPPED}")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    add("--nodes", required=True, type=positive, metavar="N", help="number of nodes")
    add("--gpus-per-node", required=True, type=positive, metavar="N", help="GPUs of one node, with a process each")
    add("--time", metavar="TIME", help="limit of one run of the job, as sbatch reads it: 24:00:00")
    add("--partition", metavar="NAME", help="where the job waits")
    add("--account", metavar="NAME", help="who pays")
    add("--dry-run", action="store_true", help="print the command, and submit nothing")
    return parser.parse_args(argv)


def sbatch_command(args: argparse.Namespace) -> list[str]:
    """The command that submits the run."""
    options = {
        "nodes": args.nodes,
        "ntasks-per-node": args.gpus_per_node,
        "gpus-per-node": args.gpus_per_node,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    overrides = [word for override in args.set for word in ("--set", override)]
    return ["sbatch", *given, str(SCRIPT), args.config, *overrides]


def run(args: argparse.Namespace) -> None:
    check_world(load_config(args.config, args.set), args.nodes * args.gpus_per_node)
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT} is not in {Path.cwd()}; start this in the root of a clone of the repository")
    command = sbatch_command(args)
    if args.dry_run:
        print(shlex.join(command))
        return
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not found; start this where jobs are submitted, or look with --dry-run")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{shlex.join(command)}: {done.stderr.strip()}")
    print(done.stdout.strip())


def main(argv: list[str] | None = None) -> int:
    return run_tool("dqt-submit", run, parse_arguments(argv))
