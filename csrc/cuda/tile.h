// How blocks of threads lie over the images of a batch.
//
// A block is `threads.x` x `threads.y` threads on one plane: x along what is adjacent in memory
// (columns, or channels in channels_last), y across it, so that in both layouts the lanes of a warp
// touch neighbours. Planes and the tiles on them are numbered along one grid dimension.
#pragma once

#include "launch.h"

namespace fastfusion::cuda {

struct Place {
  int64_t image, channel, row, column;
  bool inside;
};

// Counts of units along each dimension; a unit is what one thread computes.
template <bool LAST>
__device__ Place place(const Shape& units) {
  const int64_t fast_size = LAST ? units.channels : units.columns;
  const int64_t slow_size = LAST ? units.columns : units.rows;
  const int64_t planes = LAST ? units.rows : units.channels;
  const unsigned fast_tiles = static_cast<unsigned>((fast_size + blockDim.x - 1) / blockDim.x);
  const unsigned slow_tiles = static_cast<unsigned>((slow_size + blockDim.y - 1) / blockDim.y);
  unsigned index = blockIdx.x;
  const int64_t fast = static_cast<int64_t>(index % fast_tiles) * blockDim.x + threadIdx.x;
  index /= fast_tiles;
  const int64_t slow = static_cast<int64_t>(index % slow_tiles) * blockDim.y + threadIdx.y;
  index /= slow_tiles;
  const int64_t plane = index % static_cast<unsigned>(planes);
  const int64_t image = index / static_cast<unsigned>(planes);
  const bool inside = fast < fast_size && slow < slow_size;
  if (LAST) return {image, fast, plane, slow, inside};
  return {image, plane, slow, fast, inside};
}

struct Grid {
  int64_t blocks;
  dim3 threads;
};

// 256 threads, as many of them along the fast dimension as it has units, up to a warp.
inline Grid grid_over(const Shape& units, bool last) {
  const int64_t fast = last ? units.channels : units.columns;
  const int64_t slow = last ? units.columns : units.rows;
  const int64_t planes = last ? units.rows : units.channels;
  unsigned across = kWarp;
  while (across / 2 >= fast && across > 4) across /= 2;
  const dim3 threads(across, 256 / across);
  const int64_t tiles = divided(fast, threads.x) * divided(slow, threads.y);
  return {tiles * planes * units.batch, threads};
}

}  // namespace fastfusion::cuda
