#!/bin/sh
# From the Python language reference, which every Python ships, to a pre-trained BERT that fills masks; no network.
# usage: demo.sh BIN FOLDER    BIN has bert-fast and python; FOLDER is made anew

set -eu
PATH=$1:$PATH
demo=$2
examples=$(dirname "$0")/../examples

run() {
    echo
    echo "\$ $*"
    "$@"
}

# A model this small gains nothing from a second thread, and the process that makes batches wants the other core.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OMP_NUM_THREADS

rm -rf "$demo"
mkdir -p "$demo"
run python "$examples/python_reference.py" "$demo/corpus.jsonl"
run bert-fast tokenizer "$demo/corpus.jsonl" --vocab-size 4000 --out "$demo/tok"
run bert-fast prepare "$demo/corpus.jsonl" --tokenizer "$demo/tok" --out "$demo/data"
run bert-fast pretrain --data "$demo/data" --out "$demo/run" --model tiny --seq 64 --batch-size 16 --steps 2000 \
    --lr 3e-3 --warmup 0.1 --beta2 0.98 --dropout 0 --validation 0.1 --validate-every 500 --log-every 20
run bert-fast plot "$demo/run"
run bert-fast evaluate "$demo/run" --data "$demo/data"
run bert-fast fill-mask "$demo/run" "Changed in [MASK] 3.8." "Return the [MASK] of the string."
