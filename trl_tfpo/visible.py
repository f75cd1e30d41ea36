# Copyright 2026 The trl-tfpo authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Token rewards and traces as heat maps, in a terminal and in a notebook; and what a whole dataset of rewards looks like.

Colors never carry a meaning alone: a sign stands beside each token. Texts of models and datasets are escaped.
"""

import html
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .atomic import written_whole
from .functional import token_importance
from .printable import printable
from .token_rewards import agreement_of_faces, annotation_settings, warn_unless_faces_separate
from .trace import GuidanceTrace


GREEN, RED = (0, 136, 68), (204, 51, 51)


@dataclass(frozen=True)
class TokenMap:
    """
    Tokens with a number each, to be looked at: `print(...)` it, or leave it at the end of a notebook cell.

    Args:
        rows (sequence of `(title, tokens, values, notes)`):
            Texts, one below the other. A value of largest magnitude has the strongest color; a note has the figures of
            its token.
        legend (`str`):
            What the values mean.
    """

    rows: Sequence[tuple[str, Sequence[str], Sequence[float], Sequence[str]]]
    legend: str

    @property
    def _scale(self) -> float:
        return max((abs(x) for _, _, values, _ in self.rows for x in values if math.isfinite(x)), default=0) or 1.0

    def _strength(self, value: float) -> float:
        """In [-1, 1], zero for what is not a number."""
        return 0.0 if math.isnan(value) else max(-1.0, min(1.0, value / self._scale))

    def __rich__(self) -> Text:
        """For [rich](https://rich.readthedocs.io) consoles."""
        text = Text()
        for title, tokens, values, _ in self.rows:
            text.append(f"{printable(title)}: ", style="bold")
            for token, value in zip(tokens, values, strict=True):
                strength = self._strength(value)
                color = GREEN if strength > 0 else RED
                shade = [round(255 + (channel - 255) * abs(strength)) for channel in color]
                style = f"black on rgb({shade[0]},{shade[1]},{shade[2]})" if strength else ""
                text.append(printable(token) + _sign(strength), style=style)
            text.append("\n")
        return text.append(printable(self.legend), style="dim")

    def __str__(self) -> str:
        console = Console(soft_wrap=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip("\n")

    def table(self) -> str:
        """All tokens with their figures, a line each."""
        lines = []
        for title, tokens, _, notes in self.rows:
            width = max((len(printable(token)) for token in tokens), default=0)
            lines += [
                printable(title),
                *(f"  {printable(x):<{width}}  {printable(note)}" for x, note in zip(tokens, notes, strict=True)),
            ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: hold the pointer over a token to see its figures."""
        lines = []
        for title, tokens, values, notes in self.rows:
            spans = []
            for token, value, note in zip(tokens, values, notes, strict=True):
                strength = self._strength(value)
                color = GREEN if strength > 0 else RED
                background = f"rgba({color[0]},{color[1]},{color[2]},{abs(strength):.2f})"
                spans.append(
                    f'<span style="background:{background}" title="{html.escape(printable(note))}">'
                    f"{html.escape(printable(token))}<sup>{_sign(strength)}</sup></span>"
                )
            lines.append(
                f'<p><b>{html.escape(printable(title))}</b> <span style="white-space:pre-wrap">{"".join(spans)}</span></p>'
            )
        return f'<div class="trl-tfpo">{"".join(lines)}<p><small>{html.escape(self.legend)}</small></p></div>'


def _sign(strength: float) -> str:
    return "⁺" if strength > 0 else "⁻" if strength < 0 else ""


def _tokens(ids: Sequence[int], processing_class: PreTrainedTokenizerBase) -> list[str]:
    """The text that each token adds, special tokens by their name; bytes that make up a character show at the last one."""
    special, pieces, before = set(processing_class.all_special_ids), [], ""
    for end, token_id in enumerate(ids, start=1):
        if token_id in special:
            pieces.append(f" {processing_class.convert_ids_to_tokens(token_id)}")
            continue
        text = processing_class.decode([i for i in ids[:end] if i not in special])
        if text.endswith("\ufffd"):
            pieces.append("")
            continue
        pieces.append(text[len(before) :] if text.startswith(before) else processing_class.decode([token_id]))
        before = text
    return pieces


def show_token_rewards(example: Mapping, processing_class: PreTrainedTokenizerBase) -> TokenMap:
    """
    The token rewards of a preference pair as a heat map.

    Args:
        example (`dict`):
            A row of what [`annotate_token_rewards`] returned.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that it was annotated with.

    Returns:
        [`TokenMap`]: rewards as colors; gap, importance and reward of each token in its notes. The importance is that
        of the default settings, as a row does not say with which it was annotated.

    Raises:
        `ValueError`: when the row has no token rewards.

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
        rows.append((name, _tokens(example[f"{name}_ids"], processing_class), rewards, notes))
    return TokenMap(rows, "⁺ rewarded, ⁻ punished; the darker, the more. Gap: positive minus negative face, in nats.")


def show_trace(
    trace: GuidanceTrace, processing_class: PreTrainedTokenizerBase, eos_token_ids: Sequence[int] = ()
) -> TokenMap:
    """
    Where the doctors changed the patient's mind, as a heat map.

    Args:
        trace ([`GuidanceTrace`]):
            From [`DoctorGuidedLogitsProcessor.trace`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        eos_token_ids (`Sequence[int]`, *optional*):
            Ids that end a text beside the tokenizer's EOS, such as those of the patient's generation config.

    Returns:
        [`TokenMap`]: a row for each text, up to its end; the shift of each token as a color.
    """
    rows = []
    for row, ids in enumerate(trace.token_ids.tolist()):
        ends = {processing_class.eos_token_id, *eos_token_ids}
        length = next((at for at, token_id in enumerate(ids, start=1) if token_id in ends), len(ids))
        notes = [
            f"patient {trace.patient_logps[row, t]:.2f}, guided {trace.guided_logps[row, t]:.2f}, doctors "
            + " ".join(f"{x:.2f}" for x in trace.doctor_logps[:, row, t].tolist())
            + " nats"
            for t in range(length)
        ]
        shifts = trace.shift[row, :length].tolist()
        rows.append((f"{row}", _tokens(ids[:length], processing_class), shifts, notes))
    return TokenMap(rows, "⁺ likelier under guidance, ⁻ less likely; the darker, the more (log-probability, nats).")


def reward_report(
    dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    output_dir: str | os.PathLike,
    *,
    num_examples: int = 5,
) -> dict:
    """
    What the token rewards of a dataset look like: `rewards.png`, and `rewards.html` with the picture's figures and
    examples.

    Args:
        dataset ([`~datasets.Dataset`]):
            Annotated by [`annotate_token_rewards`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that it was annotated with.
        output_dir (`str` or `os.PathLike`):
            Folder for the two files.
        num_examples (`int`, *optional*, defaults to `5`):
            Pairs in the page.

    Returns:
        `dict`: `sparsity`, the share of tokens without a reward; `agreement`, the share of pairs whose chosen completion
        the positive face prefers by more than the rejected one, with its standard error `agreement_se`; `by_position`,
        the mean magnitude of the reward in each tenth of a completion; `most_rewarded` and `most_punished`, tokens with
        the sum of their rewards; `rounding`, of a patient in half precision, as in [`annotation_settings`], otherwise `None`.

    Raises:
        `ValueError`: when the dataset has no token rewards and gaps.

    Warns:
        `UserWarning`: when the faces do not tell chosen from rejected: `agreement` is within two standard errors of one
        half, or below.
    """
    needed = {f"{name}_{kind}" for name in ("chosen", "rejected") for kind in ("ids", "token_rewards", "gaps")}
    if not needed <= set(dataset.column_names) or len(dataset) == 0:
        raise ValueError(
            f"The dataset must have pairs with the columns {sorted(needed)}. Got {len(dataset)} with "
            f"{dataset.column_names}; pass it through `annotate_token_rewards` first."
        )
    num_tokens = num_rewarded = 0
    sums, tenths = Counter(), defaultdict(list)
    for row in dataset:
        for name in ("chosen", "rejected"):
            mask = row.get(f"{name}_mask") or [1] * len(row[f"{name}_ids"])
            scored = zip(row[f"{name}_ids"], row[f"{name}_token_rewards"], mask, strict=True)
            scored = [(token_id, reward) for token_id, reward, spoken in scored if spoken]
            num_tokens, num_rewarded = num_tokens + len(scored), num_rewarded + sum(x != 0 for _, x in scored)
            for position, (token_id, reward) in enumerate(scored):
                sums[token_id] += reward
                tenths[10 * position // len(scored)].append(abs(reward))
    agreement, error, _ = agreement_of_faces(dataset)
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
    """Rewards by position, and the tokens at both ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(10), report["by_position"])
    left.set(xlabel="tenth of the completion", ylabel="mean magnitude of the reward")
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
    with written_whole(path) as part:
        figure.savefig(part, dpi=150, format="png")


def _write_page(report: dict, examples: Sequence[TokenMap], folder: Path) -> None:
    """A page that needs nothing but the picture next to it."""
    cells = "".join(
        f"<tr><td>{html.escape(printable(token))}</td><td>{total:+.2f}</td></tr>"
        for token, total in report["most_rewarded"] + report["most_punished"][::-1]
    )
    rounding = report["rounding"] and (
        f"<p>The patient computed in half precision: gaps are off by {report['rounding']['mean']:.3f} nats on average, and rounding "
        f"decides about {report['rounding']['flipped']:.0%} of the rewards.</p>"
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Token rewards</title>'
        f"<h1>Token rewards of {report['num_pairs']} pairs</h1>"
        f"<p>{report['sparsity']:.1%} of tokens have no reward. The faces prefer the chosen completion of "
        f"{report['agreement']:.1%} of pairs (standard error {report['agreement_se']:.1%}).</p>{rounding or ''}"
        '<img src="rewards.png" alt="rewards by position, and tokens with the most reward" style="max-width:100%">'
        f"<table><tr><th>token</th><th>sum of rewards</th></tr>{cells}</table>"
        f"{''.join(example._repr_html_() for example in examples)}</html>\n"
    )
    with written_whole(folder / "rewards.html") as part:
        part.write_text(page, encoding="utf-8")
