#!/usr/bin/env bash
# One grid of runs: bash experiments/grids.sh NAME, in the folder that prepare.py made. Rows go to out/NAME/rows.jsonl;
# what is done already is not done again. JOBS runs go on at a time over all GPUs (three WikiText-2 runs fit on one of
# 80 GB). GRID holds further options of lte sweep: GRID="--discard-models".
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
name=${1:?which grid: a name of the case at the end}
ln -sfn "$here/recipes" recipes
sweep() { python3 -m lte.cli.main sweep "${command[@]}" -o "out/$name" --jobs "${JOBS:-1}" ${GRID:-} "$@"; }
command=(train)

wikitext2=(recipes/wikitext2.yaml --model smollm2 --text wikitext2/train.npy --eval-text wikitext2/test.npy
    --calibration-text wikitext2/valid.npy --torch-compile --dataloader-drop-last --per-device-eval-batch-size 16)
linear=(--lr-scheduler-type linear --lr-scheduler-kwargs "{}")
best=(--load-best-model-at-end --eval-strategy steps --save-strategy steps --save-only-model --save-total-limit 1)
trained=lte,static-pruning,cats,deja-vu,moefication,relufication,sigma-moe,topk-moe,noisy-topk
test=(--then "eval --text wikitext2/test.npy --batch-size 8")
dense=(--model out/dense/seed-42 --text wikitext2/valid.npy)

e2e=(recipes/e2e.yaml --model smollm2 --text e2e/trainset.csv --eval-text e2e/testset_w_refs.csv --calibration-text
    e2e/devset.csv)
e2e_rouge=(--then 'eval --task generation --generate --prompt "{mr}\n" --completion ref --text e2e/testset_w_refs.csv
    --sequence-length 256 --max-new-tokens 96 --batch-size 64')
xsum=(recipes/xsum.yaml --model smollm2 --text xsum/train.jsonl --eval-text xsum/test.jsonl --calibration-text
    xsum/valid.jsonl --prompt article --completion summary_gt)
xsum_rouge=(--then 'eval --task generation --generate --prompt article --completion summary_gt --text xsum/test.jsonl
    --sequence-length 1024 --max-new-tokens 64 --batch-size 32')
t0=(recipes/instruct.yaml --model smollm2 --text t0/train.jsonl --eval-text t0/heldout.jsonl --calibration-text
    t0/valid.jsonl --max-steps 600 --per-device-train-batch-size 16 --gradient-accumulation-steps 2
    --no-gradient-checkpointing --learning-rate 2e-4 --sequence-length 512 --hard-fraction 0.1)
mmlu=(--then "eval --mmlu mmlu --shots 5 --batch-size 8")
experts=(--grouping coactivation --expert-size 16 --compensation-rank 32 --save-strategy no)

glue() { # task, recipe, further options
    local task=$1 recipe=$2 kind=jsonl
    shift 2
    [[ $task == SST-2 || $task == MRPC ]] && kind=tsv
    local dev=glue/$task/dev.$kind
    sweep "recipes/$recipe.yaml" --model all-MiniLM-L6-v2 --text "glue/$task/train.$kind" --eval-text "$dev" \
        --per-device-eval-batch-size 64 "${@//DEV/$dev}"
}
glue_all() {
    local base=$name
    for pair in MRPC=mrpc SST-2=sst2 QNLI=qnli MNLI=mnli; do
        name=$base/${pair%=*}
        glue "${pair%=*}" "${pair#*=}" "$@"
    done
}

case $name in
dense) sweep "${wikitext2[@]}" "${linear[@]}" "${best[@]}" --recipe dense --max-steps 300 --metric-for-best-model eval_loss \
    --eval-steps 25 --save-steps 25 --vary seed=42,1,2 ;;
headline) sweep "${wikitext2[@]}" --vary target-sparsity=0.5,0.7,0.85 seed=42,1,2 ;;
comparison) sweep "${wikitext2[@]}" --max-steps 600 --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained ;;
ablation) # the recipe without one thing at a time
    for without in compensation-rank=0 sparsity-ramp=1 learning-rate=3e-4 lr-scheduler-kwargs='{"power":1}' \
        restart-hard=True router-start=random grouping=kmeans expert-size=32 distillation-weight=0 hardness=0 \
        temperature=1; do
        name=ablation/$without
        sweep "${wikitext2[@]}" --max-steps 600 --vary target-sparsity=0.5,0.85 "$without"
    done ;;
set) # on the dense model, without training
    command=(sparsify)
    sweep "${dense[@]}" "${test[@]}" --vary method=cats,teal,deja-vu,moefication,static-pruning \
        target-sparsity=0.3,0.5,0.7,0.85 ;;
pruned)
    command=(prune)
    sweep "${dense[@]}" "${test[@]}" --vary method=wanda,magnitude target-sparsity=0.3,0.5,0.7 ;;
other-text) sweep "${wikitext2[@]}" --then "eval --text tinyshakespeare.txt" --vary target-sparsity=0.5,0.7,0.85 ;;
paper) # the paper's ablations: lambda, grouping
    sweep "${wikitext2[@]}" "${linear[@]}" --recipe paper --eta 0.5 --expert-size 32 --compensation-rank 0 --max-steps 300 \
        --learning-rate 3e-4 --vary grouping=kmeans,coactivation,random separability-weight=0,0.5,1 ;;
glue) glue_all --vary target-sparsity=0.7,0.85 seed=42,1,2 ;;
glue-recipe) # what a small encoder wants
    glue_all --target-sparsity 0.7 --vary dense-fraction=0.25,0.5 learning-rate=1e-4,5e-5 seed=42,1,2 ;;
glue-dense) # the best step by the dev rows themselves, in dense's favour
    glue_all "${linear[@]}" "${best[@]}" --recipe dense --calibration-text DEV --metric-for-best-model eval_accuracy \
        --eval-steps 100 --save-steps 100 --vary seed=42,1,2 ;;
glue-methods) glue_all --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained ;;
e2e) sweep "${e2e[@]}" "${e2e_rouge[@]}" --vary target-sparsity=0.7,0.85 seed=42,1,2 ;;
e2e-dense) sweep "${e2e[@]}" "${best[@]}" "${e2e_rouge[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 250 --save-steps 250 --vary seed=42 ;;
e2e-methods) sweep "${e2e[@]}" "${e2e_rouge[@]}" --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained ;;
xsum) sweep "${xsum[@]}" "${xsum_rouge[@]}" --vary target-sparsity=0.6,0.75 seed=42,1,2 ;;
xsum-dense) sweep "${xsum[@]}" "${best[@]}" "${xsum_rouge[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 50 --save-steps 50 --vary seed=42 ;;
t0) sweep "${t0[@]}" "${experts[@]}" "${mmlu[@]}" --dense-fraction 0.5 --vary target-sparsity=0.5 ;;
t0-dense) sweep "${t0[@]}" "${best[@]}" "${mmlu[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 100 --save-steps 100 --vary seed=42 ;;
*) echo "there is no grid $name" >&2; exit 2 ;;
esac
