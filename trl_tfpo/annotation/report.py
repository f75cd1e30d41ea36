# SPDX-License-Identifier: Apache-2.0

"""Reports of token rewards: a heat map of a pair, and a page with figures for a dataset."""

import html
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..common.atomic import atomic_write
from ..common.heat_map import TokenMap, token_texts
from ..common.printable import printable
from ..functional import token_importance
from .agreement import agreement_of_faces, warn_unless_faces_separate
from .token_rewards import annotation_settings


def show_token_rewards(example: Mapping, processing_class: PreTrainedTokenizerBase) -> TokenMap:
    """
    Show the token rewards of a preference pair as a heat map.

    Args:
        example (`dict`):
            Row of a dataset from [`annotate_token_rewards`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the annotation.

    Returns:
        [`TokenMap`]: rewards as colors; gap, importance and reward of each token as notes. The importance is computed
        with the default settings, because a row does not contain the settings of its annotation.

    Raises:
        `ValueError`: if the row has no token rewards.

    Examples:

    ```python
    >>> from trl_tfpo import annotate_token_rewards, show_token_rewards
    >>> from trl_tfpo.testbed import load_world
    >>> world = load_world()
    >>> pairs = world.preference_dataset("praise", num_pairs=1, seed=0)
    >>> faces = world.attributes["praise"].faces
    >>> annotated = annotate_token_rewards(pairs, world.patient, world.tokenizer, faces=faces)
    >>> shown = show_token_rewards(annotated[0], world.tokenizer)
    >>> "chosen" in str(shown) and "rejected" in str(shown)
    True

    ```
    """
    rows = []
    for name in ("chosen", "rejected"):
        if f"{name}_token_rewards" not in example:
            raise ValueError(
                "The example must be a row of an annotated dataset. Got the columns "
                f"{sorted(example)}; pass the dataset through `annotate_token_rewards` first."
            )
        rewards = [float(x) for x in example[f"{name}_token_rewards"]]
        notes = [f"reward {x:+.2f}" for x in rewards]
        if example.get(f"{name}_gaps") is not None:
            gap = torch.tensor(example[f"{name}_gaps"], dtype=torch.float32)[None]  # (1, T)
            mask = torch.tensor(example.get(f"{name}_mask") or [1] * gap.size(1)).bool()[None]
            importance = token_importance(gap=gap, completion_mask=mask)[0].masked_fill(~mask[0], 0)
            notes = [
                f"gap {x:+.2f} nats, importance {share:.2f}, {note}"
                for x, share, note in zip(gap[0].tolist(), importance.tolist(), notes, strict=True)
            ]
        rows.append((name, token_texts(example[f"{name}_ids"], processing_class), rewards, notes))
    return TokenMap(rows, "⁺ rewarded, ⁻ punished; darker means stronger. Gap: positive minus negative face, in nats.")


def reward_report(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    output_dir: str | os.PathLike,
    *,
    num_examples: int = 5,
) -> dict[str, Any]:
    """
    Summarize the token rewards of a dataset in a plot, `rewards.png`, and a page with examples, `rewards.html`.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset from [`annotate_token_rewards`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the annotation.
        output_dir (`str` or `os.PathLike`):
            Folder for the two files.
        num_examples (`int`, *optional*, defaults to `5`):
            Number of pairs on the page.

    Returns:
        `dict`: `num_pairs`; `sparsity`, the share of the assistant's tokens without a reward; `agreement`, the share
        of pairs in which the faces agree with the label, with its standard error `agreement_se`; `by_position`, the
        mean absolute reward in each tenth of a completion; `most_rewarded` and `most_punished`, up to ten tokens each,
        with the sum of their rewards; `rounding`, the rounding error of a patient in half precision, or `None`.

    Raises:
        `ValueError`: if the dataset is empty, or has no token rewards or no gaps.

    Warns:
        `UserWarning`: if the faces do not separate the pairs, see [`warn_unless_faces_separate`].
    """
    needed = {f"{name}_{kind}" for name in ("chosen", "rejected") for kind in ("ids", "token_rewards", "gaps")}
    if not needed <= set(dataset.column_names) or len(dataset) == 0:
        raise ValueError(
            f"The dataset must have pairs with the columns {sorted(needed)}. Got {len(dataset)} pairs with "
            f"{dataset.column_names}; pass the dataset through `annotate_token_rewards` first."
        )
    num_tokens = num_rewarded = 0
    sums: Counter[int] = Counter()
    tenths = defaultdict(list)
    for row in dataset:
        for name in ("chosen", "rejected"):
            mask = row.get(f"{name}_mask") or [1] * len(row[f"{name}_ids"])
            tokens = zip(row[f"{name}_ids"], row[f"{name}_token_rewards"], mask, strict=True)
            scored = [(token_id, reward) for token_id, reward, is_assistant in tokens if is_assistant]
            num_tokens, num_rewarded = num_tokens + len(scored), num_rewarded + sum(x != 0 for _, x in scored)
            for position, (token_id, reward) in enumerate(scored):
                sums[token_id] += reward
                tenths[10 * position // len(scored)].append(abs(reward))
    agreement, error, _ = agreement_of_faces(dataset) or (math.nan, math.nan, 0)
    ordered = [(processing_class.decode([i]), total) for i, total in sums.most_common()]
    report = {
        "num_pairs": len(dataset),
        "sparsity": 1 - num_rewarded / num_tokens,
        "agreement": agreement,
        "agreement_se": error,
        "by_position": [sum(tenths[i]) / len(tenths[i]) if tenths[i] else math.nan for i in range(10)],
        "most_rewarded": [(token, total) for token, total in ordered[:10] if total > 0],
        "most_punished": [(token, total) for token, total in ordered[:-11:-1] if total < 0],
        "rounding": (annotation_settings(dataset) or {}).get("rounding"),
    }
    warn_unless_faces_separate(dataset)
    folder = Path(output_dir)
    _plot(report, folder / "rewards.png")
    _write_page(
        report,
        [show_token_rewards(row, processing_class) for row in dataset.select(range(min(num_examples, len(dataset))))],
        folder,
    )
    return report


def _plot(report: dict, path: Path) -> None:
    """Plot the rewards by position, and the tokens with the largest and smallest sums of rewards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(10), report["by_position"])
    left.set(xlabel="tenth of the completion", ylabel="mean absolute reward")
    ends = report["most_rewarded"] + report["most_punished"][::-1]
    colors = ["#008844" if total > 0 else "#cc3333" for _, total in ends]
    right.barh(range(len(ends)), [total for _, total in ends], color=colors)
    labels = [printable(token).replace("$", r"\$") for token, _ in ends]
    right.set_yticks(range(len(ends)), labels, fontsize="x-small")
    right.invert_yaxis()
    right.set(xlabel="sum of rewards")
    figure.suptitle(
        f"{report['sparsity']:.0%} of tokens without reward; faces agree with {report['agreement']:.0%} of labels"
    )
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png")


def _write_page(report: dict, examples: Sequence[TokenMap], folder: Path) -> None:
    """Write `rewards.html`. The page needs no other file than `rewards.png`."""
    cells = "".join(
        f"<tr><td>{html.escape(printable(token))}</td><td>{total:+.2f}</td></tr>"
        for token, total in report["most_rewarded"] + report["most_punished"][::-1]
    )
    rounding = report["rounding"] and (
        f"<p>The patient computed in half precision: the mean error of its gaps is {report['rounding']['mean']:.3f} "
        f"nats, and {report['rounding']['flipped']:.0%} of the rewards depend on rounding.</p>"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Token rewards</title>'
        f"<h1>Token rewards of {report['num_pairs']} pairs</h1>"
        f"<p>{report['sparsity']:.1%} of tokens have no reward. The faces prefer the chosen completion of "
        f"{report['agreement']:.1%} of pairs (standard error {report['agreement_se']:.1%}).</p>{rounding or ''}"
        '<img src="rewards.png" alt="rewards by position, and tokens with the highest and lowest sums" '
        'style="max-width:100%">'
        f"<table><tr><th>token</th><th>sum of rewards</th></tr>{cells}</table>"
        f"{''.join(example._repr_html_() for example in examples)}</html>\n"
    )
    with atomic_write(folder / "rewards.html") as part:
        part.write_text(page, encoding="utf-8")
