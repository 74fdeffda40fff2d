// Registers every operator of the native library: its schema and its CPU function.
#include <torch/library.h>

#include "linear_logprobs.h"
#include "yuv_to_rgb.h"

TORCH_LIBRARY(synpo_fast_native, m) {
  // lp = log softmax(f(hidden W^T + bias))[label], f(z) = softcap * tanh(z * logit_scale / softcap). Every label is valid.
  // Writes lp [N] and normalisers (a, b) [N, 2], where softmax = exp(z - a) / b, and those of the others that are not empty:
  // the direction d lp / d hidden [N, D] (bf16 or fp32 for bf16 inputs, otherwise fp32);
  // E [k, V] of the first k rows: -c_n / b_n E_nv (times logit_scale without a softcap) is the gradient of c_n lp_n with respect to the
  // raw logit v, including v = target;
  // stats [N, 4]: log sum exp z, entropy, 1 if no logit exceeds the label's, log sum of squared probabilities.
  m.def(
      "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, Tensor(a!) logps, Tensor(b!) normalisers, Tensor(c!) direction, Tensor(d!) exponentials, "
      "Tensor(e!) stats) -> ()");
  // Returns the gradients of sum_n coefficients_n * lp_n with respect to weight and, with want_bias, bias (otherwise an empty tensor).
  m.def(
      "linear_logprobs_weight_grad(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, Tensor logps, Tensor normalisers, Tensor coefficients, bool want_bias) -> (Tensor, Tensor)");
  // Converts an 8-bit 4:2:0 picture, given as planes with row strides, to RGB in out [H, W, 3]. red_weight and blue_weight are the weights of
  // red and blue in luma.
  m.def(
      "yuv420_to_rgb(Tensor luma, Tensor blue, Tensor red, int luma_stride, int blue_stride, int red_stride, "
      "Tensor(a!) out, float red_weight, float blue_weight, bool full_range, bool chroma_at_left) -> ()");
}

TORCH_LIBRARY_IMPL(synpo_fast_native, CPU, m) {
  m.impl("linear_logprobs_forward", &synpo_fast::linear_logprobs_forward);
  m.impl("linear_logprobs_weight_grad", &synpo_fast::linear_logprobs_weight_grad);
  m.impl("yuv420_to_rgb", &synpo_fast::yuv420_to_rgb);
}
