"""The page of the quality study: tables and plots from the small files of its runs.

Runs are compared with those of the same size, length and text only. A recipe is a method with its further settings;
its best run is that with the lowest validation loss at the end. Where the best rate is the lowest or the highest that
was tried, the page says so.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.common import markdown
from dqt_dist.command_line import pyplot

Facts = dict[str, Any]


def write_page(folder: Path) -> int:
    """Writes FOLDER.md and plots into FOLDER; returns the exit status."""
    facts = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not any(run["finished"] for run in facts):
        raise SystemExit(f"{folder}: holds no JSON file of a finished run; `quality.py collect` writes them")
    groups: dict[tuple[Any, ...], list[Facts]] = defaultdict(list)
    for run in facts:
        key = (
            run["size"],
            run["planned_tokens"],
            run["text"]["sha256"]["train.bin"],
            run["text"]["sha256"]["valid.bin"],
        )
        groups[key].append(run)
    parts = [INTRODUCTION]
    for number, (key, runs) in enumerate(sorted(groups.items())):
        # The text is part of the name only where it has to tell two groups apart.
        name = f"{key[0]}_{key[1] / 1e6:.0f}M"
        names = [f"{other[0]}_{other[1] / 1e6:.0f}M" for other in sorted(groups)]
        name += f"_{number}" if names.count(name) > 1 else ""
        parts.append(section(folder, name, runs))
    path = folder.with_name(folder.name + ".md")
    path.write_text("\n\n".join(parts).rstrip() + "\n")
    print(path)
    return 0


INTRODUCTION = """\
# What each method learns

Made by `benchmarks/quality.py page` from the JSON files beside this page; do not edit it. Losses are nats per token,
lower is better. "rate" is the peak rate of the linears of the blocks; "rest" is that of embeddings, head and norms.
All runs of a section see the same tokens in the same order, with the same warm-up. They differ in recipe, rates and
seed only. The settings of each run are in its JSON file. Unless a recipe says otherwise, the rates follow a cosine to
0, linears with a master decay by 0.1 as the embeddings do, latents decay by 0.1, and DQT weights without latents do
not decay.

DQT weights are integers and nothing else. "fp32 master" means that the method keeps a float weight, an fp32 copy of
it and two moments. Bytes per linear weight are those between steps on one GPU, with moments and without the gradient,
which CUDA graphs keep in every method. The bytes are measured for DQT. For methods with a master they are counted: 2
for bf16, 4 for the master, 8 for the moments.

Flips, zeros and clamped weights are shares of all codes, at the last logged step whose rate is not 0. For a stopped run
that step is in the middle of the schedule."""


def section(folder: Path, name: str, runs: list[Facts]) -> str:
    finished = sorted((run for run in runs if run["finished"]), key=lambda run: final(run))
    stopped = [run for run in runs if not run["finished"]]
    first = runs[0]
    parts = [f"## {first['size']}: {first['about_size'].split(',')[0]}, {millions(first['planned_tokens'])} tokens"]
    parts.append(setting(runs))
    if finished:
        best = best_runs(finished)
        parts += [f"### Best rate of each recipe\n\n{best_table(best, finished)}", rate_notes(best, finished)]
        images = [
            draw_curves(folder / f"{name}_curves.png", best),
            draw_rates(folder / f"{name}_rates.png", finished),
            draw_frontier(folder / f"{name}_frontier.png", best, finished),
        ]
        titles = ("loss against tokens", "final loss against rate", "loss against bytes of a linear weight")
        parts += [f"![{title}]({folder.name}/{image.name})" for title, image in zip(titles, images, strict=True)]
    parts.append(f"### All runs\n\n{all_runs_table([*finished, *stopped])}")
    return "\n\n".join(part.rstrip() for part in parts if part)


def setting(runs: list[Facts]) -> str:
    """What was done and what its limits are, in sentences."""
    first = runs[0]
    text, weights = first["text"]["tokens"], first["linear_weights"]
    seeds = {run["recipe"]: set() for run in runs}
    for run in runs:
        seeds[run["recipe"]].add(run["seed"])
    counts = sorted({len(found) for found in seeds.values()})
    of_seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    epochs = first["planned_tokens"] / text["train"]
    sentences = [
        f"{millions(weights, 1)} weights in linears, {first['tokens_per_step']:,} tokens per step.",
        f"{first['planned_tokens'] / weights:.1f} tokens per linear weight.",
        f"The training text has {millions(text['train'], 1)} tokens, so it is read {epochs:.1f} times.",
        f"Validation is on {first['valid_tokens']:,} tokens.",
        f"Seeds of a recipe: {of_seeds}.",
        f"Devices: {unique(runs, 'device')}. torch {unique(runs, 'torch')}. Commits: {unique(runs, 'commit')}. "
        f"Dates: {unique(runs, 'date')}.",
    ]
    if len(counts) > 1 or counts[0] < 3:
        sentences.append("Where a recipe has one seed, read a small difference with care.")
    if any(run["runs_at_once_per_device"] > 1 for run in runs):
        sentences.append("Several runs shared a device, so the speeds compare nothing.")
    digest = first["text"]["sha256"]
    sentences.append(
        f"sha256 of train.bin {digest['train.bin'][:16]}, of the tokenizer {digest['tokenizer.model'][:16]}."
    )
    return "\n".join(sentences)


def final(run: Facts) -> float:
    return run["valid"][-1][1]


def group_of(run: Facts) -> tuple[Any, ...]:
    """Runs that differ in their seed only."""
    return run["recipe"], run["rate"], run["rest_rate"]


def seeds_of(run: Facts, finished: list[Facts]) -> list[Facts]:
    return [other for other in finished if group_of(other) == group_of(run)]


def mean_final(run: Facts, finished: list[Facts]) -> float:
    """Mean over the seeds of this recipe at these rates."""
    return statistics.mean(final(other) for other in seeds_of(run, finished))


def best_runs(finished: list[Facts]) -> list[Facts]:
    """One run a recipe, that with the best rates by the mean of its seeds; best recipe first."""
    best: dict[str, Facts] = {}
    for run in finished:
        rival = best.get(run["recipe"])
        if rival is None or mean_final(run, finished) < mean_final(rival, finished):
            best[run["recipe"]] = run
    return sorted(best.values(), key=lambda run: mean_final(run, finished))


def best_table(best: list[Facts], finished: list[Facts]) -> str:
    baselines = {run["method"]: mean_final(run, finished) for run in best if run["method"] in ("none", "bitnet")}
    names = {run["method"]: run["recipe"] for run in best if run["method"] in baselines and run["master"]}
    columns = [
        "recipe",
        "rate",
        "rest",
        "seeds",
        "validation loss",
        *(f"minus {names[method]}" for method in baselines),
    ]
    columns += ["second text", "bytes per linear weight", "flips, before the rate is 0"]
    rows = []
    for run in best:
        same = seeds_of(run, finished)
        losses = [final(other) for other in same]
        loss = f"{statistics.mean(losses):.4f}"
        if len(losses) > 1:
            loss += f" ({min(losses):.4f} to {max(losses):.4f})"
        differences = [f"{statistics.mean(losses) - value:+.4f}" for value in baselines.values()]
        second = [other["second_text"] for other in same if other["second_text"] is not None]
        flips = run["train"].get("flip_rate")
        row = [run["recipe"], f"{run['rate']:g}", f"{run['rest_rate']:g}", str(len(losses)), loss, *differences]
        row += [
            f"{statistics.mean(second):.4f}" if second else "-",
            shown_bytes(run),
            f"{flips[moving(run)]:.2e}" if flips else "-",
        ]
        rows.append(row)
    return markdown(columns, rows)


def moving(run: Facts) -> int:
    """Index of the last logged step whose learning rate is not 0: at the last step of a cosine to 0 no code changes."""
    return -2 if run["finished"] and len(run["train"]["tokens"]) > 1 else -1


def rate_notes(best: list[Facts], finished: list[Facts]) -> str:
    """Which rates were tried for each recipe, and whether the best lies inside them."""
    lines = []
    for run in best:
        rates = sorted(
            {o["rate"] for o in finished if o["recipe"] == run["recipe"] and o["rest_rate"] == run["rest_rate"]}
        )
        tried = ", ".join(f"{rate:g}" for rate in rates)
        if len(rates) == 1:
            verdict = "No other rate has finished."
        elif run["rate"] in (rates[0], rates[-1]):
            edge = "lowest" if run["rate"] == rates[0] else "highest"
            verdict = f"The best is the {edge} of them: a better one may lie outside."
        else:
            verdict = "The best lies inside."
        lines.append(f"- {run['recipe']}: rates {tried}, rest {run['rest_rate']:g}. {verdict}")
    return "Rates that have finished:\n\n" + "\n".join(lines)


def all_runs_table(runs: list[Facts]) -> str:
    columns = (
        "run",
        "validation loss at each evaluation",
        "second text",
        "flips",
        "zeros",
        "clamped",
        "tokens/s",
        "state",
    )
    rows = []
    for run in runs:
        valid = ", ".join(f"{loss:.3f}" for _, loss in run["valid"][:-1]) + ", " * (len(run["valid"]) > 1)
        valid += f"**{final(run):.4f}**" if run["finished"] else f"{final(run):.3f}" if run["valid"] else ""
        last = [run["train"].get(key) for key in ("flip_rate", "zero_fraction", "saturation")]
        shares = [f"{values[moving(run)]:.2e}" if values else "-" for values in last]
        second = f"{run['second_text']:.4f}" if run["second_text"] is not None else "-"
        speed = f"{run['tokens_per_s']:,}" if run["tokens_per_s"] else "-"
        state = "finished" if run["finished"] else f"stopped at {millions(run['tokens'], 1)} tokens"
        rows.append([run["name"], valid, second, *shares, speed, state])
    return markdown(columns, rows)


# ---------------------------------------------------------------- plots


def colours(recipes: list[str]) -> dict[str, str]:
    """The same colour for a recipe in all plots of a section."""
    return {recipe: f"C{number % 10}" for number, recipe in enumerate(sorted(recipes))}


def draw_curves(path: Path, best: list[Facts]) -> Path:
    """Validation and training loss of the best run of each recipe, and its flips."""
    plt = pyplot()
    figure, (losses, flips) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colour_of = colours([run["recipe"] for run in best])
    for run in best:
        colour = colour_of[run["recipe"]]
        tokens = [count / 1e6 for count in run["train"]["tokens"]]
        losses.plot(tokens, run["train"]["loss"], lw=0.8, alpha=0.4, color=colour)
        label = f"{run['recipe']}, {run['rate']:g}: {final(run):.3f}"
        losses.plot(
            [t / 1e6 for t, _ in run["valid"]],
            [loss for _, loss in run["valid"]],
            "o-",
            ms=3,
            color=colour,
            label=label,
        )
        if run["train"].get("flip_rate"):
            flips.plot(tokens, run["train"]["flip_rate"], lw=1, color=colour, label=run["recipe"])
    shown = sorted(loss for run in best for _, loss in run["valid"])
    margin = 0.05 * (shown[-1] - shown[0]) or 0.01
    losses.set(xlabel="tokens, millions", ylabel="loss, nats per token", title="validation (dots) and training (thin)")
    losses.set_ylim(shown[0] - 2 * margin, shown[-1] + margin)
    flips.set(xlabel="tokens, millions", ylabel="share of codes changed in a step", yscale="log", title="flips")
    return save(plt, figure, path)


def draw_rates(path: Path, finished: list[Facts]) -> Path:
    """Final validation loss against the rate of the linears; a line a recipe and rate of the rest, a dot a seed."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colour_of = colours([run["recipe"] for run in finished])
    lines: dict[tuple[str, float], list[Facts]] = defaultdict(list)
    for run in finished:
        lines[run["recipe"], run["rest_rate"]].append(run)
    common = statistics.mode(run["rest_rate"] for run in finished)
    markers = dict(zip(sorted({rest for _, rest in lines} - {common}), "sD^v*PX", strict=False))
    for (recipe, rest), runs in sorted(lines.items()):
        label = recipe if rest == common else f"{recipe}, rest {rest:g}"
        rates = sorted({run["rate"] for run in runs})
        means = [statistics.mean(final(run) for run in runs if run["rate"] == rate) for rate in rates]
        axes.plot(rates, means, lw=1, color=colour_of[recipe])
        points = [run["rate"] for run in runs], [final(run) for run in runs]
        axes.plot(*points, markers.get(rest, "o"), ms=5, ls="", color=colour_of[recipe], label=label)
    axes.set(xlabel="peak rate of the linears", ylabel="validation loss at the end", xscale="log", title="rates")
    return save(plt, figure, path)


def draw_frontier(path: Path, best: list[Facts], finished: list[Facts]) -> Path:
    """Validation loss against bytes of a linear weight between steps; a point a recipe."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    colour_of = colours([run["recipe"] for run in best])
    for run in best:
        held = run["bytes_per_linear_weight"]
        if held is None:
            continue
        marker = "o" if run["bytes_are"] == "measured" else "s"
        label = f"{run['recipe']}: {held:.2f}"
        axes.plot(held, mean_final(run, finished), marker, ms=7, ls="", color=colour_of[run["recipe"]], label=label)
    axes.set(xlabel="bytes of a linear weight between steps (squares: counted)", ylabel="validation loss at the end")
    axes.set_title("loss against memory")
    return save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> Path:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


# ---------------------------------------------------------------- words


def millions(count: float, digits: int = 0) -> str:
    return f"{count / 1e6:,.{digits}f} M"


def shown_bytes(run: Facts) -> str:
    held = run["bytes_per_linear_weight"]
    return "-" if held is None else f"{held:.2f}" + (" by count" if run["bytes_are"] == "counted" else "")


def unique(runs: list[Facts], key: str) -> str:
    """The values of a field, each once."""
    return ", ".join(sorted({part for run in runs for part in str(run[key]).split(", ")}))
