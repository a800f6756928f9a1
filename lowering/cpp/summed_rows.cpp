// Sums of the rows of each token, of which most may not have been computed: those are not read.
//
// scalar_t, the type of all elements, is defined before this text.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <algorithm>
#include <vector>

extern "C" void kernel(
    scalar_t* rows, int64_t* back, scalar_t* result, int64_t computed, int64_t tokens, int64_t k,
    int64_t width, int64_t threads) {
  using Floats = at::vec::Vectorized<float>;
#pragma omp parallel num_threads(threads)
  {
    std::vector<const scalar_t*> own;
#pragma omp for
    for (int64_t token = 0; token < tokens; ++token) {
      own.clear();
      for (int64_t place = token * k; place < (token + 1) * k; ++place)
        if (back[place] < computed) own.push_back(rows + back[place] * width);
      for (int64_t at = 0; at < width; at += Floats::size()) {
        const int64_t count = std::min<int64_t>(Floats::size(), width - at);
        Floats sum(0);
        for (const scalar_t* row : own)
          sum = sum + at::vec::convert<float>(at::vec::Vectorized<scalar_t>::loadu(row + at, count));
        at::vec::convert<scalar_t>(sum).store(result + token * width + at, count);
      }
    }
  }
}
