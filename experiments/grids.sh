#!/usr/bin/env bash
# One grid of runs: bash experiments/grids.sh NAME, in the folder that prepare.py made. Rows go to out/NAME/rows.jsonl;
# what is done already is not done again. JOBS runs go on at a time over all GPUs (three WikiText-2 runs fit on one of
# 80 GB). GRID holds further options of lte sweep: GRID="--discard-models".
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
name=${1:?which grid: a name of the case at the end}
ln -sfn "$here/recipes" recipes
status=0 # a run that failed stops neither its sweep nor the next
sweep() { python3 -m lte.cli.main sweep "${command[@]}" -o "out/$name" --jobs "${JOBS:-1}" ${GRID:-} "$@" || status=$?; }
command=(train)

wikitext2=(recipes/wikitext2.yaml --model smollm2 --text wikitext2/train.npy --eval-text wikitext2/test.npy
    --calibration-text wikitext2/valid.npy --torch-compile --dataloader-drop-last --per-device-eval-batch-size 16)
linear=(--lr-scheduler-type linear --lr-scheduler-kwargs "{}")
best=(--load-best-model-at-end --eval-strategy steps --save-strategy steps --save-only-model --save-total-limit 1)
trained=lte,static-pruning,cats,deja-vu,moefication,relufication,sigma-moe,topk-moe,noisy-topk
test=(--then "eval --text wikitext2/test.npy --batch-size 8")

e2e=(recipes/e2e.yaml --model smollm2 --text e2e/trainset.csv --eval-text e2e/testset_w_refs.csv --calibration-text
    e2e/devset.csv --torch-compile --dataloader-drop-last --pad-to-multiple-of 160)
e2e_columns=(--task generation --prompt "{mr}\n" --completion ref)
e2e_rouge=(--then "eval ${e2e_columns[*]@Q} --generate --text e2e/testset_w_refs.csv --sequence-length 256
    --max-new-tokens 96 --batch-size 256")
xsum=(recipes/xsum.yaml --model smollm2 --text xsum/train.jsonl --eval-text xsum/test.jsonl --calibration-text
    xsum/valid.jsonl --prompt article --completion summary_gt --torch-compile --dataloader-drop-last
    --pad-to-multiple-of 1024 --per-device-train-batch-size 16 --gradient-accumulation-steps 1)
xsum_rouge=(--then 'eval --task generation --generate --prompt article --completion summary_gt --text xsum/test.jsonl
    --sequence-length 1024 --max-new-tokens 64 --batch-size 32')
t0=(recipes/instruct.yaml --model smollm2 --text t0/train.jsonl --eval-text t0/heldout.jsonl --calibration-text
    t0/valid.jsonl --torch-compile --dataloader-drop-last --pad-to-multiple-of 512)
mmlu=(--then "eval --tasks mmlu --data-folder . --num-fewshot 5 --batch-size 32")

set_on() { # what a dense model is, and how the result is measured
    local base=$name
    sweep "$@" --vary method=cats,teal,deja-vu,moefication,static-pruning target-sparsity=0.3,0.5,0.7,0.85
    name=$base-selection
    sweep "$@" --method moefication --vary selection=oracle,similarity target-sparsity=0.3,0.5,0.7,0.85
}
train=train
glue_best=("${linear[@]}" "${best[@]}" --recipe dense --metric-for-best-model eval_accuracy --eval-steps 100
    --save-steps 100)
glue() { # task, recipe, further options
    local task=$1 recipe=$2 kind=jsonl length=128 thresholds=()
    shift 2
    [[ $task == SST-2 || $task == MRPC ]] && kind=tsv
    [[ $task == SST-2 ]] && length=64
    [[ $task == MNLI ]] || thresholds=(--calibration-text "glue/$task/thresholds.jsonl")
    local dev=glue/$task/dev.$kind
    local given=("${@//DEV/$dev}")
    sweep "recipes/$recipe.yaml" --model all-MiniLM-L6-v2 --text "glue/$task/$train.$kind" --eval-text "$dev" \
        --per-device-eval-batch-size 64 --torch-compile --torch-compile-mode reduce-overhead --dataloader-drop-last \
        --sequence-length $length --pad-to-multiple-of $length "${thresholds[@]}" "${given[@]//SELECT/glue/$task/select.$kind}"
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
comparison)
    sweep "${wikitext2[@]}" --max-steps 600 --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained
    name=comparison-cheapest # as cheap as the cheapest rivals
    sweep "${wikitext2[@]}" --max-steps 600 --vary target-sparsity=0.9 ;;
ablation) # the recipe without one thing at a time
    for without in compensation-rank=0 sparsity-ramp=1 learning-rate=3e-4 lr-scheduler-kwargs='{"power":1}' \
        restart-hard=True router-start=random grouping=coactivation expert-size=32 distillation-weight=0 \
        temperature=1; do
        name=ablation/$without
        sweep "${wikitext2[@]}" --max-steps 600 --vary target-sparsity=0.5,0.7,0.85 "$without"
    done ;;
set) # on the dense model, without training
    command=(sparsify)
    set_on --model out/dense/seed-42 --text wikitext2/valid.npy "${test[@]}" ;;
pruned)
    command=(prune)
    sweep --model out/dense/seed-42 --text wikitext2/valid.npy "${test[@]}" --vary method=wanda,magnitude \
        target-sparsity=0.3,0.5,0.7,0.85 ;;
other-text) sweep "${wikitext2[@]}" --then "eval --text tinyshakespeare.txt" --vary target-sparsity=0.5,0.7,0.85 ;;
gpt2) # a GPT-2 of its own, learnt from the text alone
    sweep "${wikitext2[@]}" "${linear[@]}" "${best[@]}" --model gpt2 --recipe dense --max-steps 1500 \
        --learning-rate 1e-3 --dense-learning-rate 1e-3 --metric-for-best-model eval_loss --eval-steps 125 \
        --save-steps 125 --vary seed=42 ;;
paper) # the paper's ablations: lambda at several eta, grouping, routers that stay random
    for pair in smollm2=smollm2 gpt2=out/gpt2/seed-42; do
        name=paper/${pair%=*}
        paper=("${wikitext2[@]}" "${linear[@]}" --model "${pair#*=}" --recipe paper --expert-size 32 --compensation-rank 0
            --max-steps 300 --learning-rate 3e-4)
        sweep "${paper[@]}" --grouping kmeans --vary separability-weight=0,0.5,1 eta=0.1,0.5,2
        name=paper/${pair%=*}-grouping
        sweep "${paper[@]}" --eta 0.5 --vary grouping=coactivation,random
        name=paper/${pair%=*}-random-routers
        sweep "${paper[@]}" --eta 0.5 --grouping kmeans --vary router-learning-rate=0
    done ;;
glue) glue_all --vary target-sparsity=0.7,0.85 seed=42,1,2 ;;
glue-recipe) # without the hidden states of the teacher
    glue_all --target-sparsity 0.7 --feature-distillation-weight 0 --vary dense-fraction=0.25,0.5 \
        learning-rate=1e-4,5e-5 seed=42,1,2 ;;
glue-dense) # the best step by the dev rows themselves, in dense's favour
    glue_all "${glue_best[@]}" --calibration-text DEV --vary seed=42,1,2 ;;
glue-dense-select) # the best step by training rows kept apart
    train=rest
    glue_all "${glue_best[@]}" --calibration-text SELECT --vary seed=42,1,2 ;;
glue-set)
    command=(sparsify)
    for task in SST-2 MRPC; do
        columns=(--task classification --text-column sentence)
        [[ $task == MRPC ]] && columns=(--task classification --text-column "#1 String,#2 String" --label-column Quality)
        name=glue-set/$task
        set_on --model "out/glue-dense/$task/seed-42" --text "glue/$task/thresholds.jsonl" "${columns[@]}" \
            --then "eval ${columns[*]@Q} --text glue/$task/dev.tsv --batch-size 64"
    done ;;
glue-methods)
    glue SST-2 sst2 --max-steps 3000 --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained
    name=glue-methods-mrpc
    glue MRPC mrpc --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained ;;
e2e) sweep "${e2e[@]}" "${e2e_rouge[@]}" --vary target-sparsity=0.7,0.85 seed=42,1,2 ;;
e2e-dense) sweep "${e2e[@]}" "${best[@]}" "${e2e_rouge[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 250 --save-steps 250 --vary seed=42 ;;
e2e-set)
    command=(sparsify)
    set_on --model out/e2e-dense/seed-42 --text e2e/devset.csv "${e2e_columns[@]}" --sequence-length 160 \
        "${e2e_rouge[@]}" ;;
e2e-methods)
    sweep "${e2e[@]}" "${e2e_rouge[@]}" --vary target-sparsity=0.5,0.85,0.7,0.3 method=$trained
    name=e2e-methods-cheapest
    sweep "${e2e[@]}" "${e2e_rouge[@]}" --vary target-sparsity=0.9 ;;
xsum) sweep "${xsum[@]}" "${xsum_rouge[@]}" --vary target-sparsity=0.6,0.75 seed=42,1,2 ;;
xsum-dense) sweep "${xsum[@]}" "${best[@]}" "${xsum_rouge[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 50 --save-steps 50 --vary seed=42 ;;
t0) sweep "${t0[@]}" "${mmlu[@]}" --vary target-sparsity=0.5 seed=42,1,2 ;;
t0-dense) sweep "${t0[@]}" "${linear[@]}" "${best[@]}" "${mmlu[@]}" --recipe dense --metric-for-best-model eval_loss \
    --eval-steps 100 --save-steps 100 --vary seed=42 ;;
*) echo "there is no grid $name" >&2; exit 2 ;;
esac
exit $status
