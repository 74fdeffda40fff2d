#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace synpo_fast {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> synpo_pair_loss(
    const at::Tensor& logps, const at::Tensor& chosen_offsets, const at::Tensor& rejected_offsets,
    const std::optional<at::Tensor>& mask, double alpha, double beta, bool logsigmoid);

}  // namespace synpo_fast
