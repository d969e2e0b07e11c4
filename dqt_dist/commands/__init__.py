"""What people start: one module per command, each with a `main` that returns the exit code.

    launchers/pretrain.py      dqt-pretrain        pretrain.py
    launchers/slurm/submit.py  dqt-submit          submit.py
    tools/prepare_data.py      dqt-prepare-data    prepare_data.py
    tools/convert_ckpt.py      dqt-convert         convert_ckpt.py
    tools/evaluate.py          dqt-evaluate        evaluate.py
    tools/generate.py          dqt-generate        generate.py
    tools/inspect_ckpt.py      dqt-inspect         inspect_ckpt.py
    tools/compare_runs.py      dqt-compare         compare_runs.py

A script in the left column works in a clone that is not installed, and holds nothing but the call. pyproject.toml makes
the commands in the middle. Modules import what is heavy when they need it, so --help and a wrong argument are answered
at once.
"""
