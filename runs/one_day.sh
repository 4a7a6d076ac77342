#!/bin/sh
# A BERT-base from scratch in 24 hours, on whatever this machine has.
# usage: runs/one_day.sh CORPUS FOLDER [more flags of `bert-fast pretrain`]
#
# Method  as many updates as fit the day, nearly all at 128 tokens, with a schedule that ends with them: Izsak et al.,
#         https://arxiv.org/abs/2104.07705, on eight GPUs of 12 GB. A masking rate that falls: https://arxiv.org/abs/2305.15096.
# Cost    24 hours. The run says at its start how many updates these are, and records them: `--phases` in run/config.json.
# Gives   that paper's model came near BERT-base on GLUE. This project has not trained one for a day.
set -eu
corpus=$1 folder=$2
shift 2
[ -e "$folder/tok" ] || bert-fast tokenizer "$corpus" --vocab-size 30522 --out "$folder/tok"
[ -e "$folder/data/manifest.json" ] || bert-fast prepare "$corpus" --tokenizer "$folder/tok" --out "$folder/data"
exec bert-fast pretrain --data "$folder/data" --out "$folder/run" --model base --max-hours 24 \
    --phases 128:9000,512:1000 --batch-size 4096 --lr 1e-3 --warmup 0.06 --mask-prob 0.30:0.15 \
    --checkpoint-every 200 "$@"
