# SPDX-License-Identifier: Apache-2.0


"""
Efficiency of the defaults in random worlds. A seed determines words, grammar, attributes, lengths and rates.

```bash
python benchmarks/random_worlds.py --seeds 1 2 3 --output_dir runs/worlds
```

Both models of a world first learn its language, in about five minutes. TFPO is then measured for each attribute, as in
`sweep.py`. Worlds and models in the output folder are reused.
"""

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path

import sweep

from trl_tfpo.common.atomic import atomic_write
from trl_tfpo.testbed import load_world, random_language
from trl_tfpo.testbed.build import build


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of the languages")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/worlds"))
    parser.add_argument(
        "--quick", action="store_true", help="one world, few steps, pairs and samples, to check that it runs"
    )
    args = parser.parse_args(arguments)
    rows = []
    for seed in args.seeds[:1] if args.quick else args.seeds:
        world = args.output_dir / str(seed)
        if not world.is_dir():
            with atomic_write(world) as part, redirect_stdout(sys.stderr):
                build(part, seed=seed, steps=2 if args.quick else 1200, language=random_language(seed))
        print(f"\nWorld {seed}", flush=True)
        given = ["--world", str(world), "--output", f"{world}.jsonl", *["--quick"] * args.quick]
        rows += sweep.main([*given, "--attributes", *load_world(world).attributes, "--changes", "nothing"])
    return rows


if __name__ == "__main__":
    main()
