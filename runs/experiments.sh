#!/usr/bin/env bash
# The paper's claims at a size that anybody can run: about half a day on 2 cores (docs/experiments.md).
#
#   bash runs/experiments.sh                          Ctrl-C or a kill at any point: the same command goes on
#   bash runs/experiments.sh --claims 1 --minutes 60  what follows goes to tools/experiments.py run
#   CLIPS=data/ci bash runs/experiments.sh --quick 1  two runs of claim 1, reduced to minutes, on clips that are there (CI)
#
# A run that has its line in assets/experiments/ is not done again. Leaves weights/, data/experiments/, out/experiments/.
set -euo pipefail
cd "$(dirname "$0")/.."
CLIPS=${CLIPS:-data/demo}
if [ ! -f .venv/experiments ]; then
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt -r demo/requirements.txt -r benchmarks/requirements.txt
    touch .venv/experiments
fi
export PATH="$PWD/.venv/bin:$PATH"
models=smollm2-135m-instruct,whisper-tiny.en
case " $* " in *" --quick "*) ;; *) models+=,qwen2.5-coder-0.5b-instruct ;; esac
[ -f "$CLIPS/test.metadata.jsonl" ] || python demo/prepare.py --models "$models" --data_dir "$CLIPS"
python demo/prepare.py --models "$models" --n_train 0 --n_test 0
python tools/experiments.py run --clips "$CLIPS" "$@"
case " $* " in *" --quick "*) ;; *) python tools/experiments.py tables ;; esac
