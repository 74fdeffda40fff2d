// Converts a decoded 8-bit 4:2:0 picture to packed RGB with interpolated chroma. FFmpeg's swscale has two variants: a fast one that
// repeats each chroma sample over a square of four pixels, and an exact one that takes as long as decoding. This conversion has the
// colours of the exact variant and the speed of the fast one, and it writes directly into the output frame, which saves a copy.
//
// All arithmetic is in 16-bit integers: chroma in sixteenths (bilinear weights are 1/4, 1/2, 3/4 in both directions), colours in
// 32nds. Each rounded high product has an error of at most 1/64, so a colour value differs from the exact one by at most 1, and rarely.
#include "yuv_to_rgb.h"

#ifdef __SSSE3__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace synpo_fast {
namespace {

constexpr int64_t kBlock = 32;  // pixels; rows are padded to whole blocks, because a remainder would be processed one pixel at a time

struct Plane {
  const uint8_t* data;
  int64_t stride;
  const uint8_t* row(int64_t y) const { return data + y * stride; }
};

// Weights of luma and chroma in each colour, as factors for high_product.
struct Matrix {
  int16_t luma, offset, red_of_red, green_of_red, green_of_blue, blue_of_blue;

  Matrix(double red, double blue, bool full_range) {
    const double green = 1 - red - blue;
    const double luma_scale = full_range ? 1 : 255. / 219, chroma_scale = full_range ? 1 : 255. / 224;
    const auto chroma = [&](double factor) { return static_cast<int16_t>(std::lround(8192 * chroma_scale * factor)); };
    luma = static_cast<int16_t>(std::lround(16384 * luma_scale));
    offset = static_cast<int16_t>(std::lround(16 - (full_range ? 0 : 16 * 32 * luma_scale)));  // 16: rounds the last shift
    red_of_red = chroma(2 * (1 - red));
    green_of_red = chroma(2 * (1 - red) * red / green);
    green_of_blue = chroma(2 * (1 - blue) * blue / green);
    blue_of_blue = chroma(2 * (1 - blue));
  }
};

// Returns a * b / 2^15, rounded, written so that compilers emit a single instruction (pmulhrsw).
inline int16_t high_product(int16_t a, int16_t b) { return static_cast<int16_t>(((int32_t{a} * b >> 14) + 1) >> 1); }

inline uint8_t to_byte(int16_t colour) { return static_cast<uint8_t>(std::clamp<int16_t>(colour >> 5, 0, 255)); }

// Interpolates one row of chroma to `width` pixels, centred on 0, times 128. `between` is scratch for [-1, width / 2 + 1); `half` is the number
// of chroma samples in the row.
void widen(
    const uint8_t* near, const uint8_t* far, int64_t half, int64_t width, bool at_left, int16_t* __restrict between,
    int16_t* __restrict wide) {
  for (int64_t i = 0; i < half; ++i) between[i] = static_cast<int16_t>(3 * near[i] + far[i] - 512);
  between[-1] = between[0];
  between[half] = between[half - 1];
  if (at_left) {
    for (int64_t i = 0; i < width / 2; ++i) {
      wide[2 * i] = static_cast<int16_t>(8 * 4 * between[i]);
      wide[2 * i + 1] = static_cast<int16_t>(8 * 2 * (between[i] + between[i + 1]));
    }
  } else {
    for (int64_t i = 0; i < width / 2; ++i) {
      wide[2 * i] = static_cast<int16_t>(8 * (3 * between[i] + between[i - 1]));
      wide[2 * i + 1] = static_cast<int16_t>(8 * (3 * between[i] + between[i + 1]));
    }
  }
}

void colour(
    const uint8_t* __restrict luma, const int16_t* __restrict blue, const int16_t* __restrict red, int64_t width, const Matrix m,
    uint8_t* __restrict r, uint8_t* __restrict g, uint8_t* __restrict b) {
  for (int64_t x = 0; x < width; ++x) {
    const int16_t y = high_product(static_cast<int16_t>(luma[x] << 6), m.luma) + m.offset;
    r[x] = to_byte(y + high_product(red[x], m.red_of_red));
    g[x] = to_byte(y - high_product(red[x], m.green_of_red) - high_product(blue[x], m.green_of_blue));
    b[x] = to_byte(y + high_product(blue[x], m.blue_of_blue));
  }
}

#ifdef __SSSE3__
// Byte k of the output's third j is byte (16 j + k) / 3 of plane (16 j + k) % 3; -1 gives 0.
struct Shuffles {
  alignas(16) int8_t from[3][3][16];

  constexpr Shuffles() : from() {
    for (int at = 0; at < 48; ++at) {
      for (int plane = 0; plane < 3; ++plane) from[at / 16][plane][at % 16] = static_cast<int8_t>(at % 3 == plane ? at / 3 : -1);
    }
  }
};
constexpr Shuffles kShuffles;
#endif

// Interleaves the three colour planes of a row into packed RGB. width is a multiple of kBlock.
void interleave(const uint8_t* r, const uint8_t* g, const uint8_t* b, int64_t width, uint8_t* out) {
#ifdef __SSSE3__
  __m128i from[3][3];
  for (int third = 0; third < 3; ++third) {
    for (int plane = 0; plane < 3; ++plane) {
      from[third][plane] = _mm_load_si128(reinterpret_cast<const __m128i*>(kShuffles.from[third][plane]));
    }
  }
  for (int64_t x = 0; x < width; x += 16) {
    const __m128i red = _mm_loadu_si128(reinterpret_cast<const __m128i*>(r + x));
    const __m128i green = _mm_loadu_si128(reinterpret_cast<const __m128i*>(g + x));
    const __m128i blue = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + x));
    for (int third = 0; third < 3; ++third) {
      const __m128i red_green = _mm_or_si128(_mm_shuffle_epi8(red, from[third][0]), _mm_shuffle_epi8(green, from[third][1]));
      const __m128i bytes = _mm_or_si128(red_green, _mm_shuffle_epi8(blue, from[third][2]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * x + 16 * third), bytes);
    }
  }
#else
  for (int64_t x = 0; x < width; ++x) {
    out[3 * x] = r[x];
    out[3 * x + 1] = g[x];
    out[3 * x + 2] = b[x];
  }
#endif
}

Plane plane(const at::Tensor& bytes, int64_t stride, int64_t width, int64_t height, const char* name) {
  TORCH_CHECK_VALUE(bytes.dim() == 1 && bytes.is_contiguous() && bytes.scalar_type() == at::kByte, name, " must be contiguous uint8 [bytes]");
  TORCH_CHECK_VALUE(stride >= width && bytes.size(0) >= stride * (height - 1) + width, name, " has ", bytes.size(0),
      " bytes, too few for ", height, " rows of ", width, " every ", stride);
  return {bytes.const_data_ptr<uint8_t>(), stride};
}

}  // namespace

void yuv420_to_rgb(
    const at::Tensor& luma, const at::Tensor& blue, const at::Tensor& red, int64_t luma_stride, int64_t blue_stride,
    int64_t red_stride, at::Tensor& out, double red_weight, double blue_weight, bool full_range, bool chroma_at_left) {
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(2) == 3 && out.numel() > 0 && out.size(0) % 2 == 0 && out.size(1) % 2 == 0 && out.is_contiguous() &&
          out.scalar_type() == at::kByte,
      "out must be contiguous uint8 [H, W, 3] of an even height and width");
  TORCH_CHECK_VALUE(red_weight > 0 && blue_weight > 0 && red_weight + blue_weight < 1, "red_weight and blue_weight must be parts of 1");
  const int64_t height = out.size(0), width = out.size(1), half = width / 2, half_height = height / 2;
  const Plane y_plane = plane(luma, luma_stride, width, height, "luma");
  const Plane chroma[2] = {plane(blue, blue_stride, half, half_height, "blue"), plane(red, red_stride, half, half_height, "red")};
  const Matrix matrix(red_weight, blue_weight, full_range);

  const int64_t padded = (width + kBlock - 1) / kBlock * kBlock;
  std::vector<int16_t> between(padded / 2 + 2), wide_blue(padded), wide_red(padded);
  std::vector<uint8_t> luma_row(padded), colours(3 * padded), rgb_row(3 * padded);
  uint8_t *r = colours.data(), *g = r + padded, *b = g + padded, *to = out.mutable_data_ptr<uint8_t>();
  for (int64_t y = 0; y < height; ++y, to += 3 * width) {
    const int64_t near = y / 2, far = std::clamp<int64_t>(y % 2 ? near + 1 : near - 1, 0, half_height - 1);
    widen(chroma[0].row(near), chroma[0].row(far), half, padded, chroma_at_left, between.data() + 1, wide_blue.data());
    widen(chroma[1].row(near), chroma[1].row(far), half, padded, chroma_at_left, between.data() + 1, wide_red.data());
    if (width == padded) {
      colour(y_plane.row(y), wide_blue.data(), wide_red.data(), width, matrix, r, g, b);
      interleave(r, g, b, width, to);
    } else {
      std::memcpy(luma_row.data(), y_plane.row(y), width);
      colour(luma_row.data(), wide_blue.data(), wide_red.data(), padded, matrix, r, g, b);
      interleave(r, g, b, padded, rgb_row.data());
      std::memcpy(to, rgb_row.data(), 3 * width);
    }
  }
}

}  // namespace synpo_fast
