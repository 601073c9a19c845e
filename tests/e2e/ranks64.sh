#!/bin/bash
# 64 ranks as data 8 x tensor 8 train the paper's config, made small: 16 heads and the batch of 2048
# stay. Its losses are those of one rank.
set -eu
cd "$(dirname "$0")/../.."
. tests/tiny_run.sh
limit=$((300 * ${MD_TEST_SCALE:-1}))
store "$scratch/many.h5" 2048
cp -r config/models config/methods "$scratch"
cp config/vit_h.cfg "$scratch"
config=vit_h.cfg
keys=(data.train="$scratch/many.h5" data.workers=1 data.prefetch=1 threads=1 image.size=28
    model.width=32 model.mlp=64 model.layers=2 method.mask.count=2 method.mask.min_block=1
    method.teacher.kind=pixel train.batch=2048 train.micro_batch=256 train.max_steps=3
    optim.warmup_epochs=0 checkpoint.every=100)
done_well 1 one "${keys[@]}"
done_well 64 many "${keys[@]}" parallel.tensor=8
says "64 ranks (data 8 x tensor 8), 2048 images (256 a pass, 1 pass a step)"
whole many 3
near one many
echo ok
