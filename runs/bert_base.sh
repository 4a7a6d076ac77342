#!/bin/sh
# BERT-base as published: Devlin et al., https://arxiv.org/abs/1810.04805, appendix A.2.
# usage: runs/bert_base.sh CORPUS FOLDER [more flags of `bert-fast pretrain`]
#
# Data    the paper's is English Wikipedia's text and BooksCorpus, 3.3 billion words; CORPUS is yours, or those.
# Steps   1,000,000 updates of 256 sequences: 900,000 at 128 tokens, 100,000 at 512. AdamW, 1e-4, 10,000 updates of
#         warm-up, linear decay, no correction of the moments' bias.
# Cost    2.4e19 floating-point operations by the full formula (bert_fast/flops.py: every position of a padded batch);
#         the paper took 4 days on 16 TPU chips. `--dry-run` as last argument says what it takes here.
# Gives   the paper's base: GLUE 79.6 on average, SQuAD 1.1 F1 88.5. This project has not trained it to the end.
set -eu
corpus=$1 folder=$2
shift 2
[ -e "$folder/tok" ] || bert-fast tokenizer "$corpus" --vocab-size 30522 --out "$folder/tok"
[ -e "$folder/data/manifest.json" ] || bert-fast prepare "$corpus" --tokenizer "$folder/tok" --out "$folder/data"
exec bert-fast pretrain --data "$folder/data" --out "$folder/run" --model base \
    --phases 128:900000,512:100000 --batch-size 256 --lr 1e-4 --warmup 10000 --no-bias-correction \
    --checkpoint-every 5000 "$@"
