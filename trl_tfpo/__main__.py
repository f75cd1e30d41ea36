# SPDX-License-Identifier: Apache-2.0

"""Entry point of `python -m trl_tfpo`, the same as `trl-tfpo`."""

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
