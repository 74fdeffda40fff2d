#!/usr/bin/env bash
# Runs the checks and measurements that need a GPU, and leaves their results in the folder OUT, 10 files at most:
#
#   bash benchmarks/gpu_check.sh OUT [rehearsal] [tests] [kernels] [throughput] [trainer] [decode]
#
# Without step names the first four run.
#   rehearsal   every family's forward passes and losses, and a list of where the host waits for the device: what `make rehearse`
#               does on a simulated GPU, here on a real one
#   tests       tests of ops, fused losses and benchmarks; writes gpu_tests.xml
#   kernels     the fused head beside its peers; writes kernels.json and one picture for each of four shapes (needs matplotlib)
#   throughput  whole training steps; writes throughput.json
#   trainer     the trainer in bf16 and fp16, ZeRO 0 to 3; writes trainer_tests.xml (needs deepspeed, peft and PyAV)
#   decode      video decoders; writes decode.json (needs PyAV, and DALI for NVDEC)
#
# All output also goes to gpu_check.log. A failing step does not stop the next one; the exit code is 1 if any failed.
# Nothing is downloaded. Environment variables:
#   SYNPO_FAST_NATIVE=0   does not build the C++ extension, which no GPU figure needs
#   KERNELS_SECONDS       seconds after which the kernel table starts no new case (420)
#   KERNELS_ARGS          further arguments of kernels.py; a repeated option replaces ours: KERNELS_ARGS='--valid_rows 512 --shapes qwen2.5-7b'.
#                         We leave out torch.compile's max-autotune, which tunes for up to a minute in each case; KERNELS_ARGS='--without
#                         --shapes qwen2.5-7b --valid_rows 4096 --valid 1' measures it, too
#   THROUGHPUT_ARGS       further arguments of throughput.py: THROUGHPUT_ARGS='--sweep ratio --plot pictures'
set -uo pipefail

out=${1:?usage: gpu_check.sh OUT [rehearsal] [tests] [kernels] [throughput] [trainer] [decode]}
shift
steps=" ${*:-rehearsal tests kernels throughput} "
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
log="$out/gpu_check.log"
: >"$log"
failed=()

run() { # NAME COMMAND...
  local name=$1 code start=$SECONDS
  shift
  echo "== $name: $*" | tee -a "$log"
  "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
  echo "== $name: exit $code after $((SECONDS - start)) s" | tee -a "$log"
  [ "$code" -eq 0 ] || failed+=("$name")
}

if [ "${SYNPO_FAST_NATIVE:-}" != 0 ] && ! compgen -G 'synpo_fast/_native*.so' >/dev/null && command -v g++ >/dev/null; then
  echo '== building the C++ extension' | tee -a "$log"
  python3 setup.py build_ext --inplace >>"$log" 2>&1 || echo 'not built: see the log' | tee -a "$log"
fi

case $steps in *' rehearsal '*)
  run rehearsal python3 -m tests.rehearsal
  run waits python3 -m pytest tests/training/test_gpu_waits.py tests/ops/test_host_copy.py -m gpu -q -p no:cacheprovider ;;
esac

case $steps in *' tests '*)
  run tests python3 -m pytest tests/ops tests/fused tests/benchmarks -q -p no:cacheprovider --junitxml="$out/gpu_tests.xml" ;;
esac

case $steps in *' kernels '*)
  # shellcheck disable=SC2086
  run kernels python3 benchmarks/kernels.py --device cuda --shapes headline --valid_rows 4096 16384 512 --valid 0.25 1 \
    --head frozen trainable --dtype bf16 --rounds 11 --budget 4 --time_limit "${KERNELS_SECONDS:-420}" --without torch-compile-max-autotune \
    --json "$out/kernels.json" ${KERNELS_ARGS:-}
  if [ ! -f "$out/kernels.json" ]; then
    echo '== pictures: skipped, there is no kernels.json' | tee -a "$log"
  elif python3 -c 'import matplotlib' 2>/dev/null; then
    run pictures python3 benchmarks/head/plot.py "$out/kernels.json" --out "$out" --kind overview
  else
    echo '== pictures: skipped, matplotlib is not installed; draw them elsewhere from kernels.json' | tee -a "$log"
  fi ;;
esac

case $steps in *' throughput '*)
  # shellcheck disable=SC2086
  run throughput python3 benchmarks/throughput.py --device cuda --json "$out/throughput.json" ${THROUGHPUT_ARGS:-} ;;
esac

case $steps in *' trainer '*)
  run trainer python3 -m pytest tests/training/test_gpu.py tests/data/video/test_decode_dali.py -m gpu -q -p no:cacheprovider \
    --junitxml="$out/trainer_tests.xml" ;;
esac

case $steps in *' decode '*)
  run decode python3 benchmarks/decode.py --device cuda --codecs h264 hevc vp9 --json "$out/decode.json" ;;
esac

if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}" | tee -a "$log"
  exit 1
fi
echo 'all steps passed' | tee -a "$log"
