# SPDX-License-Identifier: Apache-2.0

"""
Table of `make demo` over several seeds: mean and standard deviation of each row, as Markdown.

```bash
python benchmarks/seeds.py --seeds 0 1 2
```

The seed changes preference pairs, training and samples. Other arguments are passed to `examples/train.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


TRAIN = Path(__file__).parents[1] / "examples" / "train.py"
COLUMNS = ("reward", "kl", "efficiency", "grammar", "distinct_4")


def main(seeds: list[int], output_dir: str, arguments: list[str]) -> None:
    reports = []
    for seed in seeds:
        run_dir = Path(output_dir) / f"seed-{seed}"
        command = [sys.executable, TRAIN, "--seed", str(seed), "--output_dir", run_dir, *arguments]
        subprocess.run(command, check=True)
        reports.append(json.loads((run_dir / "report.json").read_text(encoding="utf-8")))

    print(f"\nMean ± standard deviation over seeds {seeds}\n")
    print("| method | " + " | ".join(COLUMNS) + " |")
    print("|---" + "|---:" * len(COLUMNS) + "|")
    for rows in zip(*reports, strict=True):
        cells = [rows[0]["method"]]
        for name in COLUMNS:
            values = [row[name] for row in rows]
            cells.append("" if None in values else f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", default="runs/seeds")
    known, others = parser.parse_known_args()
    main(known.seeds, known.output_dir, others)
