// Every operator of the native library: its schema, and the CPU function behind it.
#include <torch/library.h>

#include "linear_logprobs.h"

TORCH_LIBRARY(synpo_fast_native, m) {
  // lp = log softmax(f(hidden W^T + bias))[label], f(z) = softcap * tanh(z * logit_scale / softcap). Every label is valid.
  // Returns lp [N] and normalisers [N, 2] in fp32 (softmax = exp(z - a) / b) and, where wanted, the direction [N, D]: d lp / d hidden (else empty).
  m.def(
      "linear_logprobs_forward(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, bool want_direction) -> (Tensor, Tensor, Tensor)");
  // Gradients of sum_n coefficients_n * lp_n with respect to weight and, where wanted, bias (else an empty tensor).
  m.def(
      "linear_logprobs_weight_grad(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, float logit_scale, "
      "float? softcap, Tensor logps, Tensor normalisers, Tensor coefficients, bool want_bias) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(synpo_fast_native, CPU, m) {
  m.impl("linear_logprobs_forward", &synpo_fast::linear_logprobs_forward);
  m.impl("linear_logprobs_weight_grad", &synpo_fast::linear_logprobs_weight_grad);
}
