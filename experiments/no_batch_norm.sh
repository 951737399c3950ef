#!/usr/bin/env bash
# Teachers without batch norms beside one with them, on Fashion-MNIST: NAYER, CAE and DeepInversion,
# the image prior in the place of the batch statistics, and the same without it.
#
#     experiments/no_batch_norm.sh DATA_DIR RUNS [SEED...]
#
# Every run is half as long as the data set's own setting, or as long as ROUNDS, INVERSIONS (those of
# DeepInversion) and EPOCHS (of the teachers) in the environment say, and ends in
# RUNS/TEACHER-METHOD-SEED; a finished one is skipped and an interrupted one continues.
set -euo pipefail
data=$1 runs=$2
shift 2
python=${PYTHON:-python}

for teacher in resnet20 resnet20_gn vit_tiny_cifar; do
    # The recipes differ as the networks do: a transformer learns at a lower rate.
    case $teacher in vit_tiny_cifar) lr=0.02 ;; *) lr=0.1 ;; esac
    $python -m dfkd_jax.teach --config=fashion_mnist --config.data.data_dir="$data" \
        --config.teacher.model="$teacher" --config.teach.epochs="${EPOCHS:-8}" --config.teach.lr=$lr \
        --workdir="$runs/$teacher"
done

distil() { # TEACHER METHOD NAME SEED [FLAG...]
    local teacher=$1 method=$2 name=$3 seed=$4
    shift 4
    $python -m dfkd_jax.main --config="fashion_mnist:$method" --config.data.data_dir="$data" \
        --config.teacher.model="$teacher" --config.teacher.checkpoint="$runs/$teacher" \
        --config.seed="$seed" --workdir="$runs/$teacher-$name-$seed" "$@"
}

for seed in "${@:-0}"; do
    for teacher in resnet20 resnet20_gn vit_tiny_cifar; do
        for method in nayer cae deepinversion; do
            rounds=${ROUNDS:-75}
            if [ $method = deepinversion ]; then rounds=${INVERSIONS:-40}; fi
            distil $teacher $method $method "$seed" "--config.phases[1].rounds=$rounds"
            if [ $teacher != resnet20 ]; then
                distil $teacher $method "$method-no_prior" "$seed" \
                    "--config.phases[1].rounds=$rounds" \
                    --config.image_prior.tv=0.0 --config.image_prior.l2=0.0
            fi
        done
    done
done
