#!/usr/bin/env bash
# The paper's claims at a size that anybody can run: half a day on 2 cores (docs/experiments.md).
#
#   bash runs/experiments.sh                          Ctrl-C or a kill at any point: the same command goes on
#   bash runs/experiments.sh --claims 1 --minutes 60  what follows goes to `tools/experiments.py run`
#   CLIPS=48 TEST_CLIPS=24 DATA=data/few MODELS=smollm2-135m-instruct,whisper-tiny.en \
#       bash runs/experiments.sh --quick 1            two runs of claim 1, reduced to minutes (CI)
#
# A run that has its line in assets/experiments/ is not done again. Leaves weights/, $DATA,
# data/experiments/, out/experiments/.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data/demo} MODELS=${MODELS:-smollm2-135m-instruct,whisper-tiny.en,qwen2.5-coder-0.5b-instruct}

if [ ! -f .venv/experiments ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check \
        -r requirements.txt -r demo/requirements.txt -r benchmarks/requirements.txt
    touch .venv/experiments
fi
export PATH="$PWD/.venv/bin:$PATH"

python demo/prepare.py --models "$MODELS" --data_dir "$DATA" \
    ${CLIPS:+--n_train "$CLIPS"} ${TEST_CLIPS:+--n_test "$TEST_CLIPS"}
python tools/experiments.py run --clips "$DATA" "$@"
[[ " $* " == *" --quick "* ]] || python tools/experiments.py tables
