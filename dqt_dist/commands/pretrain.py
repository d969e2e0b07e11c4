"""Pre-train one model: the command that every launcher starts, once per process."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from dqt_dist.command_line import RaisingArgumentParser, as_typed, make_parser, positive, print_any_text, side_matter
from dqt_dist.config import SHIPPED, Config, check_world, load_config
from dqt_dist.errors import RUN_ERROR_EXIT_CODE, STOPPED_EXIT_CODE, UserError, told
from dqt_dist.launch import Launch, check_gpus, discover, export, leave_warnings_to_first_rank, report
from dqt_dist.plan.arithmetic import DEVICES, check_device, device_named
from dqt_dist.plan.report import describe, plan
from dqt_dist.plan.suggest import show_suggestions
from dqt_dist.training.stop import StopSignal

IN_CLONE = """
one process:         python launchers/pretrain.py --config configs/130m_ternary.json
one machine:         deepspeed launchers/pretrain.py --config configs/1b_ternary.json
                     torchrun --nproc-per-node 8 launchers/pretrain.py --config configs/1b_ternary.json
MPI:                 mpirun -n 8 python launchers/pretrain.py --config configs/1b_ternary.json
                     launchers/mpi/pretrain.sh HOSTFILE configs/1b_ternary.json
SLURM:               srun --ntasks-per-node 8 python launchers/pretrain.py --config configs/1b_ternary.json
                     launchers/slurm/submit.py --config configs/1b_ternary.json --nodes 2 --gpus-per-node 8
no GPU:              DS_ACCELERATOR=cpu deepspeed --num_gpus 4 launchers/pretrain.py --config configs/demo_cpu.json
"""

INSTALLED = """
one process:         dqt-pretrain --config configs/130m_ternary.json
one machine:         deepspeed --no_python dqt-pretrain --config configs/1b_ternary.json
                     torchrun --no-python --nproc-per-node 8 dqt-pretrain --config configs/1b_ternary.json
MPI:                 mpirun -n 8 dqt-pretrain --config configs/1b_ternary.json
SLURM:               srun --ntasks-per-node 8 dqt-pretrain --config configs/1b_ternary.json
no GPU:              DS_ACCELERATOR=cpu deepspeed --no_python --num_gpus 4 dqt-pretrain --config configs/demo_cpu.json

configs/NAME.json is one of the configs that came with the program, where the working folder has none of that name.
"""

EXAMPLES = """\
other values:        ... --set training.steps=100 --set checkpoint.dir=runs/try   (JSON or plain text)
only look:           ... --dry-run --world-size 512 --gpu h100
                     ... --dry-run --world-size 512 --rank 317     (builds that rank, without its memory)
                     ... --plan --gpus 8 --gpu h200       (every kind of memory and traffic, expected speed)
                     ... --suggest --gpus 64              (layouts that fit, the fastest first)

The last four need no GPU, no data and no launcher. --check-files looks at data and tokenizer too.

exit codes
  0    the run is complete
  1    the run cannot go on (a rank failed or stands still, too many steps in a row without a finite loss), or it is
       complete and its loss is worse than that of a guess: one message says which
  2    wrong config, file or command line: one message says which
  75   SIGTERM, SIGUSR1, Ctrl-C or the end of the launcher stopped the run, and its state is saved; the same command
       goes on from there. deepspeed, mpirun and srun hand the code on. torchrun itself ends with 1 and names 75 in
       its report.
"""


COMMAND = "dqt-pretrain"
DEFAULT_GPU = "h100"


def main() -> int:
    print_any_text(may_be_lost=True)  # metrics.jsonl has the figures too
    launch = None
    try:
        launch = discover()
        leave_warnings_to_first_rank(launch)
        stop = StopSignal(launch.launcher)
        args = parse_arguments()
        config = load_config(args.config, args.set)
        if args.look is not None:
            if launch.rank == 0:
                look(args, config, launch.world_size if args.world_size is None else args.world_size)
            return 0
        check_world(config, launch.world_size)
        export(launch)
        choose_accelerator(launch)
        from dqt_dist.training.loop import train  # imports torch, DeepSpeed and Megatron: not before the checks

        summary = train(config, launch, args.resume, stop)
        if summary is None:
            return STOPPED_EXIT_CODE
        if launch.rank == 0:
            show_report(summary, config)
        return RUN_ERROR_EXIT_CODE if summary.get("diverged") else 0
    except Exception as error:
        message = told(error)
        if message is None:
            raise
        return report(message, launch)


def parse_arguments() -> argparse.Namespace:
    starts = INSTALLED if as_typed(COMMAND) == COMMAND else IN_CLONE
    parser = make_parser(COMMAND, __doc__, starts + EXAMPLES, RaisingArgumentParser)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help=f"JSON file of the run, as those in {SHIPPED}")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated")
    resume = (
        "auto: the newest whole checkpoint of checkpoint.dir, or from scratch when there is none; PATH: a checkpoint, "
        "or a run, which means its newest whole one"
    )
    add("--resume", default="auto", metavar="{auto,none,PATH}", help=resume)
    looks = parser.add_argument_group(
        "instead of training", "Checks the config, prints, and stops. Only rank 0 of a launcher prints."
    )
    one = looks.add_mutually_exclusive_group()
    for name, text in (
        ("dry-run", "layout, batch, and memory of a rank by kind"),
        ("plan", "beside it weights, bytes sent, expected tokens/s and days, and the same of method none"),
        ("suggest", "up to 5 layouts that fit the GPUs, fastest first, as --set arguments"),
    ):
        one.add_argument(f"--{name}", action="store_const", const=name, dest="look", help=text)
    add = looks.add_argument
    number = "number of processes, which is that of GPUs (default: those of the launcher, else 1)"
    add("--world-size", "--gpus", type=positive, metavar="N", help=number)
    add("--rank", type=int, metavar="R", help="with --dry-run: build this rank's layers and optimizer, without memory")
    known = ", ".join(device.name.lower() for device in DEVICES)
    add("--gpu", metavar="NAME", help=f"compare memory with this GPU: {known} (--plan and --suggest: {DEFAULT_GPU})")
    files = "data and tokenizer must be there and go together, as a run demands; without it they need not exist"
    add("--check-files", action="store_true", help=files)
    # deepspeed's launcher adds the rank.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.look is None and (args.world_size or args.gpu or args.check_files):
        parser.error("--world-size, --gpus, --gpu and --check-files go with --dry-run, --plan or --suggest")
    if args.look != "dry-run" and args.rank is not None:
        parser.error("--rank goes with --dry-run")
    return args


def look(args: argparse.Namespace, config: Config, world_size: int) -> None:
    """Prints what --dry-run, --plan or --suggest say of `world_size` processes. Imports torch for --rank only."""
    if args.rank is not None and not 0 <= args.rank < world_size:
        raise UserError(f"--rank {args.rank}: must be from 0 to {world_size - 1}, as --world-size is {world_size}")
    if args.check_files:
        from dqt_dist.data.indexed import check_files

        check_files(config.data, config.model.vocab_size, Path(config.data_index_folder))
    device = device_named(args.gpu or DEFAULT_GPU)
    check_device(config, device)
    if args.look == "suggest":
        print(show_suggestions(args.config, args.set, world_size, device))
    elif args.look == "plan":
        print(plan(config, world_size, device))
    else:
        print(describe(config, world_size, device if args.gpu else None))
        if args.rank is not None:
            os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # a GPU has no part in it
            from dqt_dist.training.dry_run import describe_rank

            print(f"\n{describe_rank(config, args.rank, world_size)}")


def choose_accelerator(launch: Launch) -> None:
    """GPUs, or the CPU where there are none or DS_ACCELERATOR=cpu asks for it. Before torch and DeepSpeed are imported.

    Raises UserError for fewer GPUs than processes. A CPU that was not asked for is told.
    """
    accelerator = os.environ.get("DS_ACCELERATOR")
    if accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if torch.cuda.is_available():
        check_gpus(launch, torch.cuda.device_count())
    elif accelerator is None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        if launch.rank == 0:
            print(
                f"no GPU is seen by torch {torch.__version__}: training on the CPU, as DS_ACCELERATOR=cpu asks for",
                file=sys.stderr,
                flush=True,
            )


@side_matter("the report")
def show_report(summary: dict[str, Any], config: Config) -> None:
    """Figures, sample and what to do next, after the process groups are closed; for rank 0."""
    from dqt_dist.training import report

    report.show_summary(summary, config)
    report.show_divergence(summary)
    prompt = config.training.sample_prompt
    if prompt is not None:
        from dqt_dist.inference.run_sample import sample_run

        sample = sample_run(config, report.last_checkpoint(summary, config))
        report.show_sample(sample.text, sample.explanation, prompt)
    report.show_next(config)
