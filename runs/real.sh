#!/usr/bin/env bash
# Real recordings: four public corpora, a fifth (Asterisk, for languages) where it is there, and the
# demo's clips, from the files as their authors publish them to an adapter, its table and its report
# page, on held-out speakers, notes and recordings.
#
#   CORPORA=DIR bash runs/real.sh      without DIR, or where a corpus is missing, it says what to fetch
#   BACKBONE=qwen CORPORA=DIR bash runs/real.sh      Qwen2.5-Coder-0.5B instead, with 372 instructions
#
# A second run skips what is done, Ctrl-C loses nothing finished. To see that everything works:
#   CORPORA=DIR CLIPS=12 TEST_CLIPS=4 STEPS=3 DATA=data/few OUT=out/few bash runs/real.sh
#
# Models and optimisation are the recipe "demo" of recipes.py, but for seven passes over the data, 32
# queries and windows as long as the clips (LOG.md says what each brings); the worked examples before
# the question are those of demo/real/context.json. Leaves weights/, data/real/, out/real/ (adapter,
# log, predictions, report.html); with Qwen data/real-qwen/ and so on.
set -euo pipefail
CORPORA=$(cd "${CORPORA:-/nonexistent}" 2>/dev/null && pwd || echo "${CORPORA:-}")
cd "$(dirname "$0")/.."
if [ "${BACKBONE:-smollm2}" = qwen ]; then
    NAME=real-qwen MODELS=qwen2.5-coder-0.5b-instruct,whisper-tiny.en LLM=weights/qwen2.5-coder-0.5b-instruct
    # The pool asks speakers for gender and emotion: words and voices without an emotion are left out.
    GENERATE="--system demo/context.qwen.json --instructions demo/instructions.qwen"
    GENERATE+=" --max_new_tokens 60 --keep_truncated 1"
    CORPORA_USED="animals emodb philharmonia" TRAIN="--max_answer_tokens 64" DEMO=0 DEMO_TEST=0
else
    NAME=real MODELS=smollm2-135m-instruct,whisper-tiny.en LLM=weights/smollm2-135m-instruct
    GENERATE="--system demo/real/context.json" TRAIN=""
    CORPORA_USED="animals emodb digits philharmonia asterisk"
    DEMO=${CLIPS:-60} DEMO_TEST=${TEST_CLIPS:-15}
fi
DATA=${DATA:-data/$NAME} OUT=${OUT:-out/$NAME}

# name in corpora.py, folder in $CORPORA, clips to train on, clips to test on, where it comes from
corpora() {
    cat <<END
animals Animal-Sound-Dataset ${CLIPS:-331} ${TEST_CLIPS:-64} git clone https://github.com/YashNita/Animal-Sound-Dataset
emodb emodb ${CLIPS:-408} ${TEST_CLIPS:-127} unpack http://emodb.bilderbar.info/download/download.zip into emodb/
digits free-spoken-digit-dataset ${CLIPS:-80} ${TEST_CLIPS:-12} git clone https://github.com/Jakobovski/free-spoken-digit-dataset
philharmonia philharmonia-samples ${CLIPS:-853} ${TEST_CLIPS:-120} git clone https://github.com/skratchdot/philharmonia-samples
END
    # Five languages in one corpus. It is left out where it is not there.
    [ ! -d "$CORPORA/asterisk" ] || echo "asterisk asterisk ${CLIPS:-300} ${TEST_CLIPS:-60}"
}

missing=0
while read -r name folder _ _ origin; do
    [[ " $CORPORA_USED " = *" $name "* ]] || continue
    if [ ! -d "${CORPORA:-/nonexistent}/$folder" ]; then
        [ $missing = 1 ] || echo "CORPORA has to be a folder with these corpora; missing in '$CORPORA':"
        missing=1
        echo "  $folder: $origin"
    fi
done < <(corpora)
[ $missing = 0 ] || exit 1
[[ -d "$CORPORA/asterisk" || "$CORPORA_USED" != *asterisk* ]] || cat <<END
Without recordings in several languages. To have them, on Debian, in $CORPORA:
  apt-get download asterisk-core-sounds-{en,es,fr,it,ru}{,-wav}
  for deb in asterisk*.deb; do dpkg -x \$deb asterisk; done
END

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

mkdir -p "$DATA"
step "weights and the demo's clips" python demo/prepare.py --models $MODELS --data_dir "$DATA" \
    --n_train "$DEMO" --n_test "$DEMO_TEST"
begin=$SECONDS # what follows needs no network

# Audio ids start from $DATA: the demo's clips lie there, and each corpus is a link.
train="" test=""
while read -r name folder n_train n_test _; do
    [[ " $CORPORA_USED " = *" $name "* ]] || continue
    ln -sfn "$CORPORA/$folder" "$DATA/$folder"
    if [ ! -f "$DATA/$name.train.metadata.jsonl" ]; then
        step "$name" python corpora.py "$name" "$CORPORA/$folder" --audio_root "$CORPORA" \
            --out "$DATA/$name.metadata.jsonl"
    fi
    train+="$DATA/$name.train.metadata.jsonl:$n_train,"
    test+="$DATA/$name.test.metadata.jsonl:$n_test,"
done < <(corpora)
if [ "$DEMO" != 0 ]; then
    train+="$DATA/train.metadata.jsonl:$DEMO"
    test+="$DATA/test.metadata.jsonl:$DEMO_TEST"
fi

targets() { # targets SPLIT FILE:N,FILE:N…
    local labels="$DATA/all.$1.metadata.jsonl"
    # What sound cannot teach is left out. The orchestra is split by note, so a held-out note's name
    # was never trained on. And the ears know English alone: a German sentence, which SmolLM2 likes
    # to repeat, cannot be told from its transcript.
    [ -f "$labels" ] || python tools/join.py "${2%,}" --out "$labels" --without Note,Articulation,text
    run generate_data.py --llm $LLM $GENERATE --metadata "$labels" --audio_root "$DATA" \
        --out "$DATA/all.$1.jsonl"
}
step "held-out targets" targets test "$test"
step "targets" targets train "$train"
step "training" run train.py --llm $LLM $TRAIN --data "$DATA/all.train.jsonl" \
    --eval_data "$DATA/all.test.jsonl" --audio_root "$DATA" --out "$OUT" \
    --fit_window 1 --n_queries 32 --epochs "${EPOCHS:-7}" ${STEPS:+--max_steps "$STEPS"} \
    --eval_every 250 --save_every 50
step "evaluation" run eval.py --data "$DATA/all.test.jsonl" --audio_root "$DATA" \
    --adapter "$OUT/adapter" --out "$OUT/predictions.jsonl"
step "report" python demo/report.py --data_dir "$DATA" --out "$OUT"
printf '\nAll steps after the download took %d s. Open %s/report.html\n' $((SECONDS - begin)) "$OUT"
