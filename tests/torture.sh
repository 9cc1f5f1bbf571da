#!/usr/bin/env bash
# The slow tests: hundreds of faults against tiny models (kills, full disks, bad files, absurd settings,
# a long run).
# Some ten minutes on a core.
#     bash tests/torture.sh                    # or a part of it: bash tests/torture.sh -k kill
set -euo pipefail
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 python -m pytest -m slow tests/test_faults.py tests/test_bad_input.py -v -rs -s "$@"
