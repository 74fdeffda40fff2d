#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace synpo_fast {

// Writes to the last five tensors; library.cpp describes them.
void linear_logprobs_forward(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, at::Tensor logps, at::Tensor normalisers, at::Tensor direction,
    at::Tensor exponentials, at::Tensor stats);

std::tuple<at::Tensor, at::Tensor> linear_logprobs_weight_grad(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, const at::Tensor& logps, const at::Tensor& normalisers,
    const at::Tensor& coefficients, bool want_bias);

}  // namespace synpo_fast
