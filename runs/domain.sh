#!/bin/sh
# A published checkpoint goes on with text of one domain, in its own vocabulary and 3,000 pieces of the domain's.
# usage: runs/domain.sh CHECKPOINT CORPUS FOLDER [more flags of `bert-fast pretrain`]
#
# CHECKPOINT is a folder or a name on the Hub, as google-bert/bert-base-uncased. docs/guide/domain.md has the choices.
# Steps   12,500 updates of 256 sequences of at most 512 tokens, as many updates as Gururangan et al. take for a domain
#         (https://arxiv.org/abs/2004.10964, of larger batches); 5e-5, 6 % of warm-up, linear decay.
# Cost    1.0e18 floating-point operations for a base, by the full formula. `--dry-run` says what it takes here.
# Gives   a held-out loss below the start, which the run prints; what a task gains from it depends on the domain.
set -eu
checkpoint=$1 corpus=$2 folder=$3
shift 3
[ -e "$folder/tok" ] || bert-fast tokenizer "$corpus" --extend "$checkpoint" --add 3000 --out "$folder/tok"
[ -e "$folder/data/manifest.json" ] || bert-fast prepare "$corpus" --tokenizer "$folder/tok" --out "$folder/data"
exec bert-fast pretrain --data "$folder/data" --out "$folder/run" --init-from "$checkpoint" \
    --seq 512 --steps 12500 --batch-size 256 --lr 5e-5 --warmup 0.06 --checkpoint-every 500 "$@"
