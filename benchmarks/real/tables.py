# SPDX-License-Identifier: Apache-2.0

"""Tables and figure of the bench, from its output."""

import itertools
import json
import math
import statistics
from pathlib import Path

import torch
from measures import KLS, OBJECTIVE_KLS
from signals import SIGNAL_KLS


OURS = "TFPO, calibrated"


def read(output: Path, **key) -> list[dict]:
    """Return the rows of an output that have these values."""
    lines = output.read_text(encoding="utf-8").splitlines() if output.is_file() else []
    return [row for row in map(json.loads, lines) if all(row.get(name) == value for name, value in key.items())]


def report(output: Path, tasks: list[str]) -> None:
    """Print the tables of an output, in Markdown."""
    for task in tasks:
        signals_table(task, read(output, task=task, kind="signal"))
        methods_table(task, read(output, task=task, kind="test"))
        best_of_table(task, read(output, task=task, kind="best of"))
        sampled_table(task, read(output, task=task, kind="sampled"))
    objectives_table(read(output, kind="objectives"))


def signals_table(task: str, rows: list[dict]) -> None:
    print(f"\n## {task}: signals\n")
    print("| reward of a text | " + " | ".join(f"{kl} nats" for kl in SIGNAL_KLS) + " | correlation |")
    print("|---" + "|---:" * (len(SIGNAL_KLS) + 1) + "|")
    for name in dict.fromkeys(row["signal"] for row in rows):
        mine = [row for row in rows if row["signal"] == name]
        cells = [spread([row[f"{kl} nats"] for row in mine]) for kl in SIGNAL_KLS]
        print(f"| {name} | " + " | ".join(cells) + f" | {spread([row['correlation'] for row in mine])} |")


def methods_table(task: str, rows: list[dict]) -> None:
    print(f"\n## {task}: efficiency on test prompts\n")
    titles = ["method", "seeds", *(f"{kl} nats" for kl in KLS), "tokens at 1 nat", "ends", "training (s)"]
    print("| " + " | ".join(titles) + " |\n|---" + "|---:" * (len(titles) - 1) + "|")
    for name in sorted(dict.fromkeys(row["method"] for row in rows), key=lambda name: name.startswith("best of")):
        mine = [row for row in rows if row["method"] == name]
        kls = sorted({row["kl"] for row in mine})
        cells = [interval([row for row in mine if row["kl"] == kl]) for kl in KLS]
        if not set(kls) & set(KLS):
            cells = [f"at {kls[0]:.2f}: {interval(mine)}"] + [""] * (len(KLS) - 1)
        at_one = [row for row in mine if row["kl"] == 1.0 and "tokens" in row]
        cells += [f"{statistics.mean(row[x] for row in at_one):.2f}" if at_one else "" for x in ("tokens", "ends")]
        seconds = [row["seconds"] for row in mine if "seconds" in row]
        cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
        print(f"| {name} | {len({row['seed'] for row in mine})} | " + " | ".join(cells) + " |")
    versus(rows, OURS)


def best_of_table(task: str, rows: list[dict]) -> None:
    """Print the best of n guided answers. The KL is an upper bound, see `measures.best_of_kl`."""
    if not rows:
        return
    print(f"\n## {task}: the best of n guided answers, efficiency on test prompts\n")
    print("| method | n | " + " | ".join(f"{kl} nats" for kl in KLS) + " |\n|---|---:" + "|---:" * len(KLS) + "|")
    for name, n in dict.fromkeys((row["method"], row["n"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["n"]) == (name, n)]
        cells = [interval([row for row in mine if row["kl"] == kl]) for kl in KLS]
        print(f"| {name} | {n} | " + " | ".join(cells) + " |")
    for n in dict.fromkeys(row["n"] for row in rows):
        print(f"\nBest of {n}:")
        versus([row for row in rows if row["n"] == n], OURS)


def sampled_table(task: str, rows: list[dict]) -> None:
    if not rows:
        return
    print(f"\n## {task}: sampled texts\n")
    print("| method | strength | KL (nats) | gain | tokens | ends | distinct-4 | nats per token under the patient |")
    print("|---" + "|---:" * 7 + "|")
    for row in rows:
        strength = f"{row['strength']:.3g}" if row.get("strength") else ""
        kl, gain = (
            f"{row[x]:.2f} {_between(bootstrap(torch.tensor([row[y]])))}"
            for x, y in (("kl", "kl_by_prompt"), ("gain", "by_prompt"))
        )
        if row["method"] == "patient":
            kl, gain = "0", "0"
        cells = [f"{row[x]:.2f}" for x in ("tokens", "ends", "distinct_4", "surprise")]
        print(f"| {row['method']} | {strength} | {kl} | {gain} | " + " | ".join(cells) + " |")


def objectives_table(rows: list[dict]) -> None:
    """Print the gain of each method in each score, and its efficiency, for each weighting and KL."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    if not methods:
        return
    print("\n## Two objectives at once\n")
    names = list(rows[0]["weights"])
    titles = [" : ".join(names), "nats", *(x for name in methods for x in (f"{name}, gains", "efficiency"))]
    print("| " + " | ".join(titles) + " |\n|---" + "|---:" * (len(titles) - 1) + "|")
    weightings = list({tuple(row["weights"].values()): row["weights"] for row in rows}.values())
    for weights in weightings:
        for kl in OBJECTIVE_KLS:
            cells = []
            for name in methods:
                mine = [r for r in rows if (r["method"], r["weights"], r["kl"]) == (name, weights, kl)]
                gains = [f"{statistics.mean(r['gains'][x] for r in mine):.3f}" for x in names] if mine else []
                cells += [" and ".join(gains), interval(mine)]
            print(f"| {' : '.join(f'{w:g}' for w in weights.values())} | {kl} | " + " | ".join(cells) + " |")
    print("\n| mean efficiency over the weightings | " + " | ".join(f"{kl} nats" for kl in OBJECTIVE_KLS) + " |")
    print("|---" + "|---:" * len(OBJECTIVE_KLS) + "|")
    columns = [_mean_column(rows, methods, kl) for kl in OBJECTIVE_KLS]
    for name, *cells in zip([*methods, "the first divided by the second"], *columns, strict=False):
        print(f"| {name} | " + " | ".join(cells) + " |")


def _mean_column(rows: list[dict], methods: list[str], kl: float) -> list[str]:
    """Return the mean efficiency of each method at a KL, and the ratio of the first two."""
    parts = [over_weightings([r for r in rows if r["method"] == name and r["kl"] == kl]) for name in methods]
    if len(parts) < 2 or any(x is None or x.shape != parts[0].shape for x in parts):
        return [""] * (len(methods) + 1)
    draws = bootstrap(torch.stack(parts, dim=1))  # (draws, methods), of (seeds, methods, P)
    cells = [f"{x.mean():.2f} {_between(y)}" for x, y in zip(parts, draws.T, strict=True)]
    return [*cells, f"{parts[0].mean() / parts[1].mean():.2f} {_between(draws[:, 0] / draws[:, 1])}"]


def over_weightings(rows: list[dict]) -> torch.Tensor | None:
    """Return efficiency (seeds, P) as a mean over weightings, or None if one of them is unknown."""
    by_seed = {row["seed"]: [] for row in rows}
    for row in rows:
        share = row["efficiency"] / row["gain"] if "efficiency" in row else math.nan
        by_seed[row["seed"]].append([share * gain for gain in row["by_prompt"]])
    if not rows or len({len(x) for x in by_seed.values()}) > 1:
        return None
    parts = torch.tensor([by_seed[seed] for seed in sorted(by_seed)]).mean(dim=1)
    return None if parts.isnan().any() else parts


def _between(draws: torch.Tensor) -> str:
    low, high = draws.quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"({low:.2f} to {high:.2f})"


def versus(rows: list[dict], ours: str) -> None:
    """Print ratios of the gain of one method to the gains of the others, with bootstrap intervals."""
    print(f"\n| gain of *{ours}*, divided by that of | " + " | ".join(f"{kl} nats" for kl in KLS) + " |")
    print("|---" + "|---:" * len(KLS) + "|")
    for name in dict.fromkeys(row["method"] for row in rows if "strength" in row and row["method"] != ours):
        cells = []
        for kl in KLS:
            sides = [
                {r["seed"]: r["by_prompt"] for r in rows if r["method"] == x and r["kl"] == kl} for x in (ours, name)
            ]
            seeds = sorted(sides[0].keys() & sides[1].keys())
            if not seeds:
                cells.append("")
                continue
            gains = torch.tensor([[side[seed] for seed in seeds] for side in sides])  # (2, seeds, P)
            draws = bootstrap(gains.transpose(0, 1))  # (draws, 2)
            cells.append(f"{(gains[0].mean() / gains[1].mean()).item():.2f} {_between(draws[:, 0] / draws[:, 1])}")
        print(f"| {name} | " + " | ".join(cells) + " |")


def bootstrap(gains: torch.Tensor, num_draws: int = 2000) -> torch.Tensor:
    """Return means of gains (seeds, ..., P) over resampled seeds and prompts."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(len(gains), (num_draws, len(gains)), generator=generator)
    some = torch.randint(gains.size(-1), (num_draws, gains.size(-1)), generator=generator)
    return torch.stack([gains[s][..., p].mean(dim=-1).mean(dim=0) for s, p in zip(seeds, some, strict=True)])


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def interval(rows: list[dict]) -> str:
    """Return mean efficiency, or gain if the frontier is unknown, with its 95% interval from [`bootstrap`]."""
    if not rows:
        return ""
    is_known = all(row.get("efficiency") is not None for row in rows)
    possible = rows[0]["gain"] / rows[0]["efficiency"] if is_known else 1.0
    gains = torch.tensor([row["by_prompt"] for row in rows])  # (seeds, P)
    return (
        "" if is_known else "gain "
    ) + f"{gains.mean().item() / possible:.2f} {_between(bootstrap(gains) / possible)}"


# Figure

COLOURS = {
    OURS: "tab:blue",
    "GenARM": "tab:green",
    "DPO": "tab:orange",
    "TFPO, published rewards": "tab:red",
}
OURS_OF_2 = "TFPO, best of 2"
POINTS = {"best of 2 by the scorer": "best of 2", "best of 4 by the scorer": "best of 4"}


def plot(output: Path, tasks: list[str], path: Path) -> None:
    """Draw the frontier and the gain of each method against its KL, with 95% bands, in one panel for each task."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "svg.hashsalt": "bench"}):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for index, task in enumerate(tasks):
            axes = figure.add_subplot(1, len(tasks), index + 1)
            draw_task(axes, task, read(output, task=task))
            axes.set_title(task, fontweight="bold")
        figure.axes[0].set_ylabel("score gained over the patient")
        figure.supxlabel("KL from the patient (nats per answer)", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw_task(axes, task: str, rows: list[dict]) -> None:
    """Draw one panel, with labels at the ends of the lines."""
    axes.set_xscale("function", functions=(lambda x: x**0.5, lambda x: x**2))  # gains are almost linear in the root
    ends = []
    for row in (row for row in rows if row["kind"] == "frontier"):
        kls, gains, errors = (torch.tensor(row[x]) for x in ("kls", "gains", "standard_errors"))
        axes.plot(kls, gains, color="black", linewidth=1.5)
        axes.fill_between(kls, gains - 2 * errors, gains + 2 * errors, color="black", alpha=0.12, linewidth=0)
        ends.append((kls[-1].item(), gains[-1].item(), "best possible", "black"))
    tests = [row for row in rows if row["kind"] == "test"]
    guided = {name: [row for row in tests if row["method"] == name] for name in COLOURS}
    best = [row for row in rows if row["kind"] == "best of"]
    guided[OURS_OF_2] = [row for row in best if (row["method"], row["n"]) == (OURS, 2)]
    for name, found in guided.items():
        mine = [row for row in found if row["kl"] in KLS]
        kls = sorted({row["kl"] for row in mine})
        if not kls:
            continue
        by_kl = [torch.tensor([row["by_prompt"] for row in mine if row["kl"] == kl]) for kl in kls]
        low, high = zip(*(bootstrap(x).quantile(torch.tensor([0.025, 0.975])).tolist() for x in by_kl), strict=True)
        means, start = [x.mean().item() for x in by_kl], [] if name == OURS_OF_2 else [0.0]
        colour, style = COLOURS.get(name, COLOURS[OURS]), "--" if name == OURS_OF_2 else "-"
        axes.plot([*start, *kls], [*start, *means], style, color=colour, linewidth=2.5 if name == OURS else 1.5)
        axes.fill_between([*start, *kls], [*start, *low], [*start, *high], color=colour, alpha=0.15, linewidth=0)
        ends.append((kls[-1], means[-1], name.removesuffix(" rewards"), colour))
    for name, shown in POINTS.items():
        for row in [row for row in tests if row["method"] == name][:1]:
            axes.plot(row["kl"], row["gain"], "D", color="black", markersize=5)
            axes.annotate(shown, (row["kl"], row["gain"]), (7, -4), textcoords="offset points", va="top", fontsize=9)
    furthest = max((kl for kl, *_ in ends), default=1.0)
    ticks = [kl for kl in (0, *KLS) if kl <= furthest]
    axes.set(xlim=(0, 3 * furthest), ylim=(0, None), xticks=ticks, xticklabels=[f"{kl:g}" for kl in ticks])
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines["bottom"].set_bounds(0, furthest)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    ends.sort(key=lambda end: end[1])
    heights, apart = [gain for _, gain, *_ in ends], 0.06 * axes.get_ylim()[1]
    for low, high in itertools.chain.from_iterable(itertools.repeat(list(itertools.pairwise(range(len(ends)))), 50)):
        overlap = max(apart - (heights[high] - heights[low]), 0) / 2  # move neighbours until no labels overlap
        heights[low], heights[high] = heights[low] - overlap, heights[high] + overlap
    for (kl, _, name, colour), height in zip(ends, heights, strict=True):
        place = dict(xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.annotate(name, (kl, height), color=colour, **place)
