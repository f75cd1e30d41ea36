# SPDX-License-Identifier: Apache-2.0

"""
Efficiency of doctors of several sizes for patients of several sizes, in the controlled world.

```bash
python benchmarks/weak_to_strong.py --output_dir runs/weak_to_strong
```

Patients and doctors of several widths learn the language by the recipe of `trl_tfpo.testbed.build`. The package's own
models are used for their widths. Each doctor is aligned with the defaults for each patient, on pairs and token rewards
of this patient, and measured as in `sweep.py`. Results in the output folder are reused.
"""

import argparse
import itertools
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import sweep
from transformers import set_seed

from trl_tfpo.common.atomic import atomic_write
from trl_tfpo.testbed import load_world
from trl_tfpo.testbed.build import RECIPES, instructions_of, make_model, train_model


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--patients", type=int, nargs="+", default=[64, 96, 128], help="widths of the patients, multiples of 8"
    )
    parser.add_argument(
        "--doctors", type=int, nargs="+", default=[24, 48], help="widths of the doctors, multiples of 8"
    )
    parser.add_argument("--steps", type=int, help="steps of language training (default: from the recipe)")
    parser.add_argument("--attribute", default="praise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/weak_to_strong"))
    parser.add_argument(
        "--quick", action="store_true", help="few sizes, pairs, steps and samples, to check that it runs"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.patients, args.doctors = args.patients[:2], args.doctors[:1]
    rows = []
    for patient, doctor in itertools.product(args.patients, args.doctors):
        folder = make_world(patient, doctor, args)
        world = load_world(folder)
        sizes = [f"{name} {getattr(world, name).num_parameters() / 1e6:.2f}M" for name in ("patient", "doctor")]
        print("\n" + ", ".join(sizes), flush=True)
        given = ["--world", str(folder), "--output", f"{folder}.jsonl", *["--quick"] * args.quick]
        given += ["--attributes", args.attribute, "--seeds", str(args.seed), "--changes", "nothing"]
        rows += sweep.main(given)
    return rows


def make_world(patient: int, doctor: int, args: argparse.Namespace) -> Path:
    """Return the folder of a patient and a doctor of these widths, in the format of `load_world`."""
    world = args.output_dir / f"{patient}-{doctor}"
    for name, width in (("patient", patient), ("doctor", doctor)):
        if not (world / name).is_dir():
            with atomic_write(world / name) as part:
                shutil.copytree(trained_model(name, width, args), part, dirs_exist_ok=True)
    return world


def trained_model(name: str, width: int, args: argparse.Namespace) -> Path:
    """Return the folder of a model of this width, trained on the language."""
    folder, recipe, shipped = args.output_dir / f"{name}-{width}", RECIPES[name], load_world()
    if width == recipe["size"]["hidden_size"]:
        return shipped.weights / name
    if folder.is_dir():
        return folder
    set_seed(args.seed)
    model = make_model(
        shipped.tokenizer, **recipe["size"] | dict(hidden_size=width, intermediate_size=width * 11 // 4)
    )
    with redirect_stdout(sys.stderr):  # stdout is for the table
        train_model(
            model,
            shipped.tokenizer,
            instructions=instructions_of(shipped.language) if recipe["is_instructed"] else ("",),
            steps=args.steps or (2 if args.quick else recipe["steps"]),
            learning_rate=recipe["learning_rate"],
            seed=args.seed,
        )
    with atomic_write(folder) as part:
        model.save_pretrained(part)
        shipped.tokenizer.save_pretrained(part)
    return folder


if __name__ == "__main__":
    main()
