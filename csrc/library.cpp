// Every operator of the native library: its schema, and the CPU function behind it.
#include <torch/library.h>

#include "linear_logprobs.h"
#include "pair_loss.h"
#include "yuv_to_rgb.h"

TORCH_LIBRARY(synpo_fast_native, m) {
  // lp = log softmax(f(hidden W^T + bias))[label], f(z) = softcap * tanh(z * logit_scale / softcap). Every label is valid.
  // Returns lp [N] and normalisers [N, 2] in fp32 (softmax = exp(z - a) / b) and, where wanted, the direction [N, D]: d lp / d hidden (else
  // empty). With keep_exponentials also E [N, V], such that c_n / b_n E_nv (times logit_scale without a softcap) is minus the
  // gradient of c_n lp_n to logit v, the target's included.
  m.def(
      "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, bool want_direction, bool keep_exponentials=False) -> (Tensor, Tensor, Tensor, Tensor)");
  // Gradients of sum_n coefficients_n * lp_n with respect to weight and, where wanted, bias (else an empty tensor).
  m.def(
      "linear_logprobs_weight_grad(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, Tensor logps, Tensor normalisers, Tensor coefficients, bool want_bias) -> (Tensor, Tensor)");
  // Loss [P] of each pair, statistics [5, P] (mean lp of both, geometric means of both, arithmetic mean of the chosen),
  // d loss / d lp [N] of each token, and how many pairs had an empty response and were left out [1].
  m.def(
      "synpo_pair_loss(Tensor logps, Tensor chosen_offsets, Tensor rejected_offsets, Tensor? mask, float alpha, "
      "float beta, bool logsigmoid) -> (Tensor, Tensor, Tensor, Tensor)");
  // An 8-bit 4:2:0 picture, its planes as they lie in memory, into out [H, W, 3]. The weights are those of red and blue in luma.
  m.def(
      "yuv420_to_rgb(Tensor luma, Tensor blue, Tensor red, int luma_stride, int blue_stride, int red_stride, "
      "Tensor(a!) out, float red_weight, float blue_weight, bool full_range, bool chroma_at_left) -> ()");
}

TORCH_LIBRARY_IMPL(synpo_fast_native, CPU, m) {
  m.impl("linear_logprobs_forward", &synpo_fast::linear_logprobs_forward);
  m.impl("linear_logprobs_weight_grad", &synpo_fast::linear_logprobs_weight_grad);
  m.impl("synpo_pair_loss", &synpo_fast::synpo_pair_loss);
  m.impl("yuv420_to_rgb", &synpo_fast::yuv420_to_rgb);
}
