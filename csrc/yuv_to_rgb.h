#pragma once

#include <ATen/core/Tensor.h>

namespace synpo_fast {

void yuv420_to_rgb(
    const at::Tensor& luma, const at::Tensor& blue, const at::Tensor& red, int64_t luma_stride, int64_t blue_stride,
    int64_t red_stride, at::Tensor& out, double red_weight, double blue_weight, bool full_range, bool chroma_at_left);

}  // namespace synpo_fast
