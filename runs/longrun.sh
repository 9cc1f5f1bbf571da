#!/usr/bin/env bash
# The speedrun's method with more clips and more steps: within 2 hours on 2 cores.
#
#   bash runs/longrun.sh        Ctrl-C or a kill at any point: the same command continues where it stopped
#
# Leaves data/long/ and out/longrun/ (adapter, log, predictions, report.html).
set -euo pipefail
cd "$(dirname "$0")/.."
export CLIPS=${CLIPS:-3000} TEST_CLIPS=${TEST_CLIPS:-300} EPOCHS=${EPOCHS:-4}
export DATA=${DATA:-data/long} OUT=${OUT:-out/longrun}
bash runs/speedrun.sh
