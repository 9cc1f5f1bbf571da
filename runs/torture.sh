#!/usr/bin/env bash
# The slow tests: hundreds of faults against tiny models (kills, full disks, bad files, absurd settings, a long run). About an hour on 2 cores.
#     bash runs/torture.sh                    # or a part of it: bash runs/torture.sh -k kill
set -euo pipefail
cd "$(dirname "$0")/.."
OMP_NUM_THREADS=1 python -m pytest -m slow tests/test_faults.py tests/test_bad_input.py -v -rs -s "$@"
