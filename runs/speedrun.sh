#!/usr/bin/env bash
# The whole method on a laptop: two CPU cores, a quarter of an hour after the downloads, no model hub,
# no GPU.
#
#   bash runs/speedrun.sh        from a fresh clone
#
# A second run skips what is done, Ctrl-C loses nothing finished. To see that everything works (CI):
#   CLIPS=48 TEST_CLIPS=24 STEPS=3 DATA=data/few OUT=out/few bash runs/speedrun.sh
#
# All values are the scripts' defaults, the recipe "demo" of recipes.py.
# Leaves weights/, data/demo/, out/demo/ (adapter, log, predictions, report.html).
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-data/demo} OUT=${OUT:-out/demo}

step() { # step "name" command...: say what runs, run it, say how long it took
    local start=$SECONDS
    printf '\n== %s\n   %s\n' "$1" "${*:2}"
    "${@:2}"
    printf '== %s: %d s\n' "$1" $((SECONDS - start))
}

if [ ! -f .venv/ready ]; then
    step "virtual environment" python3 -m venv .venv
    step "packages" .venv/bin/pip install --quiet --disable-pip-version-check \
        -r requirements.txt -r demo/requirements.txt
    touch .venv/ready
fi
export PATH="$PWD/.venv/bin:$PATH"
# One process per core: on CPUs two processes do almost twice the work of one process with two
# threads (LOG.md).
export OMP_NUM_THREADS=1
run() { torchrun --standalone --nproc_per_node="${PROCESSES:-2}" "$@"; }

step "weights and clips" python demo/prepare.py --data_dir "$DATA" \
    ${CLIPS:+--n_train "$CLIPS"} ${TEST_CLIPS:+--n_test "$TEST_CLIPS"}
begin=$SECONDS # what follows needs no network
for part in test train; do
    step "targets, $part" run generate_data.py --metadata "$DATA/$part.metadata.jsonl" \
        --audio_root "$DATA" --out "$DATA/$part.jsonl"
done
step "training" run train.py --data "$DATA/train.jsonl" --eval_data "$DATA/test.jsonl" \
    --audio_root "$DATA" --out "$OUT" ${EPOCHS:+--epochs "$EPOCHS"} ${STEPS:+--max_steps "$STEPS"}
step "evaluation" run eval.py --data "$DATA/test.jsonl" --audio_root "$DATA" --adapter "$OUT/adapter" \
    --out "$OUT/predictions.jsonl"
step "report" python demo/report.py --data_dir "$DATA" --out "$OUT"
printf '\nAll steps after the clips took %d s. Open %s/report.html\n' $((SECONDS - begin)) "$OUT"
