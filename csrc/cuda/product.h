// Matrix products by a block of threads, operands in shared or global memory.
//
// A thread computes 4x4 of the result: of each operand it loads 4x4 values by four vector loads for
// 64 multiply-adds. All sizes and strides are multiples of 4; what pads an operand's depth is 0.
#pragma once

#include "device.h"

namespace fastfusion::cuda {

// 4x4 values of a matrix as it lies in memory, and of its transpose.
struct Lines {
  const float* data;
  int stride;

  __device__ void operator()(int row, int column, float (&to)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) load(data + (row + i) * stride + column, to[i]);
  }
};
struct Turned {
  const float* data;
  int stride;

  __device__ void operator()(int row, int column, float (&to)[4][4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float line[4];
      load(data + (column + j) * stride + row, line);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i][j] = line[i];
    }
  }
};

// Adds to a thread's 4x4 of the result: rows from `row` on of the left operand, columns from
// `column` on of the right one.
template <typename A, typename B>
__device__ void add_product(const A& left, int row, const B& right, int column, int depth,
                            float (&sum)[4][4]) {
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    float of_left[4][4], of_right[4][4];
    left(row, k, of_left);
    right(k, column, of_right);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += of_left[i][n] * of_right[n][j];
  }
}

// (rows, depth) times (depth, columns): put(row, column, values) for each 4x4 of the result, by the
// same thread whenever the sizes are the same. a(column) is the left operand for these columns.
template <typename A, typename B, typename Put>
__device__ void product(int rows, int columns, int depth, const A& a, const B& b, const Put& put) {
  const int across = columns / 4, tiles = rows / 4 * across;
  for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
    const int row = tile / across * 4, column = tile % across * 4;
    float sum[4][4] = {};
    add_product(a(column), row, b, column, depth, sum);
    put(row, column, sum);
  }
}

}  // namespace fastfusion::cuda
