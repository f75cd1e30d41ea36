# SPDX-License-Identifier: Apache-2.0

"""
Strength of a doctor in nats: the KL of the guided policy from the patient at several exponents of the doctor.

The table is measured on validation prompts ([`~trl_tfpo.evaluation.measure_strengths`]) and saved with the doctor, in
a file and in its model card. It maps a KL to the exponent.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..common.atomic import FORMAT, atomic_write, check_format
from ..common.printable import cell
from .fingerprint import patient_fingerprint
from .named_model import SOURCE, check_model_exists


STRENGTHS_FILE = "strengths.json"
POLICY_SETTINGS = ("alpha", "beta", "reference", "min_patient_prob", "min_patient_entropy")  # settings of a guide
_CHECKED: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()  # tables compared with each patient
TITLE = "Strength in nats"
SECTION = """\
## {title}

KL of the guided policy from the patient {patient}, summed over the tokens of a completion: the mean over {num_prompts}
validation prompts with {num_samples_per_prompt} sample(s) each, of at most {max_new_tokens} tokens, at temperature 1.
The exponent `alpha` of the patient is {alpha}.

{table}

The KL depends on the patient and the prompts, and grows with the length. Choose a strength by its KL:

```python
guide = DoctorGuidedLogitsProcessor.from_pretrained("<this repository or folder>", kl={example})
```

"""


@dataclass(frozen=True)
class Strength:
    """
    The KL at one exponent.

    Args:
        beta (`float`):
            Exponent of the doctor, above 0.
        kl (`float`):
            Mean KL from the patient per completion, in nats.
        low, high (`float`, *optional*):
            Ends of the 95% interval of the mean, over prompts. `None` if there was a single completion.
        num_tokens (`float`):
            Mean length of a completion, in tokens.
    """

    beta: float
    kl: float
    low: float | None
    high: float | None
    num_tokens: float


@dataclass(frozen=True)
class StrengthTable:
    """
    KLs of a doctor from a patient, and how they were measured.

    Args:
        rows (`tuple` of [`Strength`]):
            The KL at each exponent, in ascending order of the exponents.
        alpha (`float`, *optional*):
            Exponent of the patient. `None` means `1 - beta`.
        patient (`str`):
            Name of the patient.
        patient_fingerprint (`str`):
            The [`~trl_tfpo.models.fingerprint.patient_fingerprint`] of the patient.
        tokenizer (`str`):
            The [`~trl_tfpo.data.tokenizer_identity.tokenizer_fingerprint`] of patient and doctor.
        num_prompts, num_samples_per_prompt, max_new_tokens, seed (`int`):
            The sample, and the maximum length of a completion.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.

    Raises:
        `ValueError`: if there is no row, exponents are not positive and ascending, or a KL is negative or not finite.
    """

    rows: tuple[Strength, ...]
    alpha: float | None
    patient: str
    patient_fingerprint: str
    tokenizer: str
    num_prompts: int
    num_samples_per_prompt: int
    max_new_tokens: int
    seed: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        betas = [0.0, *(row.beta for row in self.rows)]
        is_ascending = all(low < high < math.inf for low, high in zip(betas, betas[1:], strict=False))
        if not self.rows or not is_ascending or not all(0 <= row.kl < math.inf for row in self.rows):
            raise ValueError(
                "A table of strengths must have a row, positive exponents in ascending order, and finite KLs of at "
                f"least 0. Got {[(row.beta, row.kl) for row in self.rows]}; measure it again."
            )

    @property
    def max_kl(self) -> float:
        """
        Largest KL that [`beta_at`] accepts: the end of the range in which the KL increases with the exponent. Above
        it, a KL would not determine the exponent.
        """
        return self._increasing()[-1].kl

    def beta_at(self, kl: float) -> float:
        r"""
        Return the exponent of the doctor at a KL.

        Between two rows $\sqrt{\operatorname{KL}}$ is interpolated linearly. It is 0 at the exponent 0, and nearly
        linear for small exponents $\beta$, where the KL is about proportional to $\beta^2$.

        Args:
            kl (`float`):
                KL in nats per completion, from 0 to [`max_kl`].

        Raises:
            `ValueError`: if the KL is not in the measured range.
        """
        is_number = isinstance(kl, Real) and not isinstance(kl, bool)
        if not is_number or not 0 <= kl <= self.max_kl:
            raise ValueError(
                f"`kl` must be a number of nats in the measured range, from 0 to {self.max_kl:.4g}. Got {kl!r}; "
                "choose a KL in this range, measure larger exponents with `trl-tfpo strengths --strengths`, or pass "
                "`beta`."
            )
        rows = self._increasing()
        return float(np.interp(kl**0.5, [row.kl**0.5 for row in rows], [row.beta for row in rows]))

    def warn_of_other_patient(self, patient: PreTrainedModel) -> None:
        """Warn if the KLs were measured with other weights than those of `patient`. Each patient is checked once."""
        checked = _CHECKED.setdefault(patient, set())
        if self.patient_fingerprint in checked:
            return
        checked.add(self.patient_fingerprint)
        if patient_fingerprint(patient) != self.patient_fingerprint:
            warnings.warn(
                "The strengths of a doctor depend on the patient. Got other weights than those of "
                f"{self.patient!r}, with which the strengths were measured, so the KL may differ from `kl`. Measure "
                "them with this patient: `trl-tfpo strengths`.",
                stacklevel=3,
            )

    def save(self, folder: str | os.PathLike) -> None:
        """Write the table into the folder of a doctor: a file and, if there is a model card, a section of it."""
        contents = json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n"
        card = Path(folder) / "README.md"
        with atomic_write(Path(folder) / STRENGTHS_FILE) as part:
            part.write_text(contents, encoding="utf-8")
        if card.is_file():
            text = with_section(card.read_text(encoding="utf-8"), self)
            with atomic_write(card) as part:
                part.write_text(text, encoding="utf-8")

    def as_table(self) -> str:
        """Return the KLs as a Markdown table."""
        lines = ["| `beta` | KL in nats | 95% interval | tokens |", "|---:|---:|---:|---:|"]
        for row in self.rows:
            interval = "" if row.low is None or row.high is None else f"{row.low:.4g} to {row.high:.4g}"
            lines.append(f"| {row.beta:.4g} | {row.kl:.4g} | {interval} | {row.num_tokens:.1f} |")
        return "\n".join(lines)

    def as_section(self) -> str:
        """Return the section of the model card."""
        facts = {name: getattr(self, name) for name in ("num_prompts", "num_samples_per_prompt", "max_new_tokens")}
        return SECTION.format(
            title=TITLE,
            patient=cell(self.patient or "without a name"),
            alpha="`1 - beta`" if self.alpha is None else f"{self.alpha:g}",
            table=self.as_table(),
            example=math.floor(min(1.0, self.max_kl) * 100) / 100,
            **facts,
        )

    def _increasing(self) -> list[Strength]:
        """Rows up to the first one whose KL is not larger than that of its predecessor, beginning with the patient."""
        rows = [Strength(0.0, 0.0, 0.0, 0.0, 0.0)]
        for row in self.rows:
            if row.kl <= rows[-1].kl:
                break
            rows.append(row)
        return rows


def load_strengths(path: str | os.PathLike, **kwargs: Any) -> StrengthTable | None:
    """
    Load the table of strengths of a doctor.

    Args:
        path (`str` or `os.PathLike`):
            Folder or Hub id of the doctor.
        kwargs:
            As for `from_pretrained`. Only arguments that locate files are used, such as `revision`.

    Returns:
        [`StrengthTable`], or `None` if the doctor has none.

    Raises:
        `ValueError`: if the folder does not exist, the file is damaged, or its format is not supported.
    """
    check_model_exists(path)
    source = {name: kwargs[name] for name in SOURCE if name in kwargs}
    file = cached_file(path, STRENGTHS_FILE, _raise_exceptions_for_missing_entries=False, **source)
    if file is None:
        return None
    try:
        contents = json.loads(Path(file).read_text(encoding="utf-8"))
        found, rows = contents.pop("format"), tuple(Strength(**row) for row in contents.pop("rows"))
        check_format(found, f"The table of strengths in {str(path)!r}")
        return StrengthTable(rows, **contents)
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`{STRENGTHS_FILE}` must be a table of strengths. Got {str(path)!r} with a file that cannot be read: "
            f"{error!r}; measure it again with `trl-tfpo strengths`, or delete it."
        ) from error


def delete_strengths(folder: str | os.PathLike) -> None:
    """Delete the table of an earlier doctor in a folder."""
    (Path(folder) / STRENGTHS_FILE).unlink(missing_ok=True)


def beta_for_kl(
    doctors: Sequence[str | os.PathLike], kl: float, settings: Mapping[str, object], **source: Any
) -> tuple[float, StrengthTable]:
    """
    Return the exponent of a saved doctor at a KL, and its table.

    Args:
        doctors (sequence of `str`):
            Folder or Hub id of one doctor.
        kl (`float`):
            KL in nats per completion.
        settings (mapping from `str`):
            Other arguments of the guide.
        source:
            As in [`load_strengths`].

    Raises:
        `ValueError`: for several doctors, whose KLs do not add up; if a setting changes the measured policy; if the
            doctor has no table; if the KL is not in its range.
    """
    if len(doctors) != 1:
        raise ValueError(
            f"`kl` is the strength of one doctor, because KLs of several doctors do not add up. Got {len(doctors)} "
            "doctors; pass a `beta` for each."
        )
    given = {name: settings[name] for name in POLICY_SETTINGS if settings.get(name) is not None}
    changed = [name for name, value in given.items() if not (name.startswith("min_") and value == 0)]
    if changed:
        raise ValueError(
            "`kl` determines `beta`, given the default `alpha` and no other settings of the policy. Got `kl` and "
            f"{changed}; leave out one or the other."
        )
    table = load_strengths(doctors[0], **source)
    if table is None:
        raise ValueError(
            f"`kl` needs the strengths of the doctor. Got {str(doctors[0])!r} without `{STRENGTHS_FILE}`; measure "
            "them with `trl-tfpo strengths`, or pass `beta`."
        )
    return table.beta_at(kl), table


def with_section(card: str, table: StrengthTable) -> str:
    """Replace the section of a model card that has the table, or insert it in front of the second section."""
    section = table.as_section()
    card, num_replaced = re.subn(
        rf"^## {TITLE}\n.*?(?=^## |\Z)", lambda _: section, card, count=1, flags=re.MULTILINE | re.DOTALL
    )
    if num_replaced:
        return card
    headings = [match.start() for match in re.finditer(r"^## ", card, flags=re.MULTILINE)]
    if len(headings) < 2:
        return f"{card.rstrip()}\n\n{section}"
    return f"{card[: headings[1]]}{section}{card[headings[1] :]}"
