// Products of the rows of each group with the matrix of that group, several groups at once.
//
// Groups of experts are small: ten rows meet a matrix of a megabyte. So matrices are read once, in
// the order in which they lie in memory, and never copied. A task is a few columns for one group;
// each thread takes the next one, so uneven groups balance. Each element is summed up by one
// thread in one order: results do not depend on the number of threads or the size of groups.
//
// scalar_t, the type of all elements, is defined before this text.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace {

using Floats = at::vec::Vectorized<float>;

constexpr int kLanes = Floats::size();
// A tile has one sum per lane of a vector; each is a register of partial sums until the end.
constexpr int kColumns = 4;
constexpr int kRows = kLanes / kColumns;
constexpr int64_t kTask = 16 * kColumns;
// Columns of so many bytes leave room in the first cache for the next ones beside them.
constexpr int64_t kNear = 16 << 10;

// Elements of a row or column that are multiplied at once; the last may be filled up with zeros.
template <typename T>
struct Piece {
  static constexpr int size = 2 * kLanes;
  Floats low, high;
  Piece(const T* from, int count) {
    using Packed = at::vec::Vectorized<T>;
    std::tie(low, high) = at::vec::convert_to_float<T>(
        count == size ? Packed::loadu(from) : Packed::loadu(from, count));
  }
  Floats times(const Piece& other, const Floats& sum) const {
    return at::vec::fmadd(high, other.high, at::vec::fmadd(low, other.low, sum));
  }
};

template <>
struct Piece<float> {
  static constexpr int size = kLanes;
  Floats values;
  Piece(const float* from, int count)
      : values(count == size ? Floats::loadu(from) : Floats::loadu(from, count)) {}
  Floats times(const Piece& other, const Floats& sum) const {
    return at::vec::fmadd(values, other.values, sum);
  }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <>
struct Piece<at::BFloat16> {
  static constexpr int size = 2 * kLanes;
  __m512bh values;
  Piece(const at::BFloat16* from, int count)
      : values((__m512bh)_mm512_maskz_loadu_epi16(0xffffffffu >> (size - count), from)) {}
  Floats times(const Piece& other, const Floats& sum) const {
    return _mm512_dpbf16_ps(sum, values, other.values);
  }
};
#endif

// Lane i of the result is the sum of all lanes of vector i.
template <int Count>
inline __attribute__((always_inline)) Floats lane_sums(const Floats* vectors, int stride = 1) {
  if constexpr (Count == 1) {
    return *vectors;
  } else {
    auto [low, high] = at::vec::interleave2(
        lane_sums<Count / 2>(vectors, 2 * stride),
        lane_sums<Count / 2>(vectors + stride, 2 * stride));
    return low + high;
  }
}

// Rows times kColumns columns, of which the first `valid` are stored.
template <int Rows>
void tile(
    const scalar_t* rows, const scalar_t* const* columns, int64_t width, int64_t ahead,
    scalar_t* result, int64_t result_stride, int valid) {
  using Part = Piece<scalar_t>;
  Floats sums[kRows][kColumns];  // zeros
  auto step = [&](int64_t at, int count) __attribute__((always_inline)) {
    auto part = [&](int c) { return Part(columns[c] + at, count); };
    const Part parts[kColumns] = {part(0), part(1), part(2), part(3)};
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) __builtin_prefetch(columns[c] + at + ahead);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Part row(rows + r * width + at, count);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[r][c] = row.times(parts[c], sums[r][c]);
    }
  };
  int64_t at = 0;
  for (; at + Part::size <= width; at += Part::size) step(at, Part::size);
  if (at < width) step(at, width - at);

  scalar_t lanes[kLanes];
  at::vec::convert<scalar_t>(lane_sums<kLanes>(sums[0])).store(lanes, kLanes);
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < kColumns; ++c)
      if (c < valid) result[r * result_stride + c] = lanes[r * kColumns + c];
}

template <int Rows = kRows, typename... Args>
void tile_of(int64_t rows, Args... args) {
  if (rows == Rows) {
    tile<Rows>(args...);
  } else if constexpr (Rows > 1) {
    tile_of<Rows - 1>(rows, args...);
  }
}

}  // namespace

// Strides are in elements; columns of matrices are contiguous.
extern "C" void kernel(
    scalar_t* rows, scalar_t* weights, int64_t* ends, scalar_t* result, int64_t count,
    int64_t groups, int64_t width, int64_t columns, int64_t group_stride, int64_t column_stride,
    int64_t threads) {
  for (int64_t group = 0; group < groups; ++group)
    if (ends[group] < (group ? ends[group - 1] : 0) || ends[group] > count)
      throw std::out_of_range("ends of groups do not ascend from 0 to the number of rows");
  const bool near = kColumns * width * sizeof(scalar_t) <= kNear;
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t task = 0; task < columns; task += kTask) {
      const int64_t start = group ? ends[group - 1] : 0, size = ends[group] - start;
      const int64_t tiles = (size + kRows - 1) / kRows;  // of about the same number of rows
      for (int64_t c = task; size && c < std::min(columns, task + kTask); c += kColumns) {
        const int valid = std::min<int64_t>(kColumns, columns - c);
        const scalar_t* own[kColumns];
        for (int i = 0; i < kColumns; ++i)
          own[i] = weights + group * group_stride + (c + std::min(i, valid - 1)) * column_stride;
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t first = start + size * i / tiles, next = start + size * (i + 1) / tiles;
          const int64_t ahead = i == 0 || near ? kColumns * column_stride : 0;
          tile_of(
              next - first, rows + first * width, own, width, ahead, result + first * columns + c,
              columns, valid);
        }
      }
    }
  }
  const int64_t end = groups ? ends[groups - 1] : 0;
  std::fill(result + end * columns, result + count * columns, scalar_t(0));
}
