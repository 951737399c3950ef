#!/usr/bin/env bash
# What a single GPU can tell in ten minutes, in order of worth; gpu.md says what waits for it.
#
#     TEACHER=cifar10_resnet56.th DATA=DIR experiments/gpu.sh [PART...]
#     experiments/gpu.sh wheels DIR       collects what a machine without a network lacks
#
# Parts, in this order if none is named, each with its own limit of time (seconds of ten minutes):
#
#     check    30  versions, driver, and that JAX sees the GPU
#     nayer   140  the published CIFAR-10 schedule, ResNet-56 -> ResNet-20, bfloat16
#     cpsc     90  the same of CPSC-DFKD
#     steps    90  rounds and student steps of NAYER at ResNet-34 -> ResNet-18 beside eager PyTorch;
#                  rounds fused and step by step
#     compile  90  the same beside torch.compile too
#     layers   40  two layers of the generators, each beside the plain way
#     sd       90  a guided step at the size of Stable Diffusion 1.5
#     more      -  what time is left goes to NAYER's schedule
#
# A part writes as it goes, and one that is out of time or fails does not stop the next.  The runs
# are continued from where they stopped: the same command again is the next ten minutes.  What is
# left at the end is in $OUT, and all small files of it in $OUT/receipts.tar.gz.
#
# Variables: TEACHER, the published checkpoint; DATA, CIFAR-10 as `python -m dfkd_jax.data prepare`
# writes it (without it, runs measure agreement); OUT; RUNS, the folder of the runs; MINUTES; PYTHON;
# WHEELS, a folder of wheels to install from; PAIR, another pair of configs/cifar10.py; TINY=1, the
# same on a CPU at tiny sizes, to try it; DRY=1, to print the commands.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-experiments/gpu}") RUNS=$(realpath -m "${RUNS:-runs/gpu}")
PYTHON=${PYTHON:-python3} PAIR=${PAIR:-resnet56-resnet20} MINUTES=${MINUTES:-10}
TINY=${TINY:-} DRY=${DRY:-} DATA=${DATA:-} TEACHER=${TEACHER:-} WHEELS=${WHEELS:-}
END=$((MINUTES * 60 - 25)) failed=0 # a run that is told to stop saves first

# What runs the library and is not on every machine with JAX and PyTorch; as they passed the tests.
wheels() {
    local folder=$1 most=$((48 * 2 ** 20)) size name
    mkdir -p "$folder"
    while read -r name; do
        "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version=3.12 \
            --implementation=cp --platform=manylinux_2_28_x86_64 --platform=manylinux_2_27_x86_64 \
            --platform=manylinux2014_x86_64 --dest="$folder" "$name" ||
            "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir="$folder" "$name" || exit 1
    done < <(grep -v '^#' experiments/gpu_wheels.txt)
    size=$(cat "$folder"/*.whl | wc -c)
    echo "$folder: $(ls "$folder"/*.whl | wc -l) wheels, $((size / 2 ** 20)) MiB"
    ((size <= most)) || { echo "error: more than $((most / 2 ** 20)) MiB" >&2; exit 1; }
}

# part NAME SECONDS COMMAND...: runs a command; SECONDS of ten minutes, or of MINUTES in proportion.
part() {
    local name=$1 limit=$(($2 * END / 575)) left code began=$SECONDS; shift 2
    if [[ $DRY ]]; then printf '%q ' "$name" "$limit" "$@"; echo; return; fi
    left=$((END - SECONDS)); ((limit > left)) && limit=$left
    if ((limit < 10)); then echo "$name: no time is left" | tee -a "$OUT/parts.txt"; return; fi
    timeout --signal=TERM --kill-after=20 "$limit" "$@" > "$OUT/$name.log" 2>&1; code=$?
    ((code == 0 || code == 124)) || failed=1
    echo "$name: exit $code after $((SECONDS - began)) of $limit s" | tee -a "$OUT/parts.txt"
    tail -n 3 "$OUT/$name.log"
}

# run METHOD SECONDS [NAME]: a published schedule, as far as the time goes.
run() {
    local fields=(--config.dtype=bfloat16 --config.log_every_rounds=1)
    [[ $1 == cpsc ]] && fields=(--config.dtype=bfloat16 --config.log_every_rounds=50)
    [[ $DATA ]] && fields+=(--config.data.data_dir="$DATA")
    [[ $TEACHER ]] && fields+=(--config.teacher.checkpoint="$TEACHER")
    # A bank of 160,000 images takes a second to save, and a stopped run saves anyway.
    part "${3:-$1}" "$2" "$PYTHON" -m dfkd_jax.main --config="cifar10:$1,$PAIR${TINY:+,smoke}" \
        --workdir="$RUNS/$1" "${fields[@]}" --config.save_every_rounds=1000
}

do_check() { part check 30 "$PYTHON" -c "$CHECK" "${TINY:-0}"; }
CHECK='
import subprocess, sys, flax, jax, jax.numpy as jnp, numpy
device = jax.devices()[0]
for name in (jax, flax, numpy): print(name.__name__, name.__version__)
print("python", sys.version.split()[0], "device", device.device_kind, "x", jax.device_count())
if device.platform != "gpu" and sys.argv[1] == "0":
    sys.exit("error: jax sees no GPU: install jax[cuda12] or jax[cuda13], or set TINY=1")
if device.platform == "gpu": print(subprocess.run(["nvidia-smi"], capture_output=True).stdout.decode())
x = jnp.ones((64, 64), jnp.bfloat16)
print("a product gives", float((x @ x)[0, 0]), "of 64")
import dfkd_jax.build
'
do_nayer() { run nayer 140; }
do_cpsc() { run cpsc 90; }
do_more() { run nayer $(((END - SECONDS) * 575 / END + 1)) more; }

do_steps() { steps steps --part-seconds=0; }
do_compile() { steps compile --part-seconds=0 --compile; }
steps() {
    local name=$1; shift
    local sizes=(--pair=resnet34/resnet18 --batch=256 --dtype=bfloat16 --round=3+10 --seconds=3
        --block-seconds=0.5)
    [[ $TINY ]] && sizes=(--config=digits --pair=resnet8/resnet8_half --batch=8 --width=4 --round=1+1
        --seconds=0.01 --block-seconds=0.01)
    part "$name" 90 "$PYTHON" experiments/bench/steps.py --method=nayer "${sizes[@]}" "$@" --both \
        --kinds=round,student --output="$OUT"
}

do_layers() {
    local sizes=(--batch=512 --dtype=bfloat16 --seconds=0.5)
    [[ $TINY ]] && sizes=(--batch=2 --dtype=float32 --seconds=0.01 --shapes=4x8x8)
    part layers 40 "$PYTHON" experiments/bench/layers.py "${sizes[@]}" --output="$OUT"
}

do_sd() {
    local sizes=(--batch=1,4 --remat=1)
    [[ $TINY ]] && sizes=(--batch=1 --remat=0 --size=8 --tiny)
    part sd 90 "$PYTHON" experiments/bench/sd_step.py "${sizes[@]}" --run --output="$OUT"
}

install() { # once for a folder of runs
    local site=$RUNS/site
    if [[ ! -e $site/installed ]]; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
            --target="$site" "$WHEELS"/*.whl && touch "$site/installed" || exit 1
    fi
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
}

if [[ ${1:-} == wheels ]]; then wheels "${2:?the folder for the wheels}"; exit; fi
parts=("$@")
((${#parts[@]})) || parts=(check nayer cpsc steps compile layers sd more)
for name in "${parts[@]}"; do
    declare -F "do_$name" > /dev/null || { echo "error: no part $name: see the head of $0" >&2; exit 2; }
done
if [[ ! $DRY ]]; then
    mkdir -p "$OUT" "$RUNS"
    [[ $WHEELS ]] && install
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$RUNS/compiled}
    [[ $TINY ]] && export JAX_PLATFORMS=cpu
fi
for name in "${parts[@]}"; do
    "do_$name"
    if [[ $name == check ]] && ((failed)); then exit 1; fi
done
[[ $DRY ]] && exit
for run in nayer cpsc; do # what of a run is small
    for file in metrics.csv summary.json config.json inputs.json report.html student.safetensors; do
        [[ -e $RUNS/$run/$file ]] && cp "$RUNS/$run/$file" "$OUT/$run-$file"
    done
done
(cd "$OUT" && find . -type f -size -8M ! -name receipts.tar.gz -print0 |
    tar --create --gzip --file=receipts.tar.gz --null --files-from=-)
echo "all in $OUT; $(((SECONDS + 59) / 60)) of $MINUTES minutes"
exit $failed
