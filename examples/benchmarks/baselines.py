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
Other ways to the same end, in the controlled world, each a line of a JSON-lines file as it is measured.

```bash
python examples/benchmarks/baselines.py --methods temperature best_of_n --seed 0 --output runs/baselines.jsonl
```

What the file already holds is not measured again.
"""

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from trl_tfpo import DoctorGuidedLogitsProcessor
from trl_tfpo.testbed import Comparison, load_world


def temperature(comparison: Comparison, value: float) -> dict:
    """The patient alone at a temperature: the product of itself to the power of one over it, and of nothing else."""
    guide = DoctorGuidedLogitsProcessor(comparison.world.patient, alpha=0.0, beta=1 / value)
    return comparison.add("temperature", guide, beta=value)


def best_of_n(comparison: Comparison, n: int) -> dict:
    """The best of n patient samples, chosen by the oracle itself."""
    return comparison.add_best_of_n(n)


GRID = {temperature: (0.3, 0.5, 0.7, 0.85, 1.2), best_of_n: (2, 4, 8, 16)}


def main(arguments: list[str] | None = None) -> None:
    methods = {method.__name__: method for method in GRID}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(methods))
    parser.add_argument("--attribute", default="praise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/baselines.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few samples: whether it runs, not what it shows")
    args = parser.parse_args(arguments)

    shared = {"attribute": args.attribute, "seed": args.seed, "num_samples_per_prompt": 8 if args.quick else 120}
    settings = [shared | {"method": name, "strength": x} for name in args.methods for x in GRID[methods[name]]]
    lines = args.output.read_text(encoding="utf-8").splitlines() if args.output.is_file() else []
    done = [{name: row[name] for name in settings[0]} for row in map(json.loads, lines)]
    todo = [setting for setting in settings if setting not in done]
    if not todo:
        return
    comparison = Comparison(
        load_world(), args.attribute, num_samples_per_prompt=shared["num_samples_per_prompt"], seed=args.seed
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for setting in tqdm(todo):
        row = methods[setting["method"]](comparison, setting["strength"])
        measured = {name: x for name, x in row.items() if name not in ("method", "beta", "texts")}
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(setting | measured) + "\n")


if __name__ == "__main__":
    main()
