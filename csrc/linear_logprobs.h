#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace synpo_fast {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> linear_logprobs_forward(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, bool want_direction, bool keep_exponentials);

std::tuple<at::Tensor, at::Tensor> linear_logprobs_weight_grad(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels, const std::optional<at::Tensor>& bias,
    double logit_scale, std::optional<double> softcap, const at::Tensor& logps, const at::Tensor& normalisers,
    const at::Tensor& coefficients, bool want_bias);

}  // namespace synpo_fast
