// LSO's solver: s = z + offset + sum_q a_q sin(q w z) + b_q cos(q w z), in float.
//
// One sine and cosine of an exactly reduced angle, then a rotation a term.
#pragma once

#include "launch.h"

namespace fastfusion::cuda {

constexpr float kPi = 3.14159265358979f;

struct Series {
  const float* terms;   // (Q, C, 2): a_q, b_q
  const float* offset;  // (C)
  int channels, basis;
  float turns, rest;  // w / (2 pi) in two floats
  float fundamental;  // w
  bool squash;

  __device__ void term(int q, int channel, float (&ab)[2]) const {
    load(terms + (static_cast<int64_t>(q) * channels + channel) * 2, ab);
  }
};

struct Rotation {
  float sine, cosine;

  __device__ void turn(const Rotation& by) {
    const float turned = sine * by.cosine + cosine * by.sine;
    cosine = cosine * by.cosine - sine * by.sine;
    sine = turned;
  }
};

// Sine and cosine of w z: whole turns fall away before anything is rounded.
__device__ inline Rotation rotation(float z, const Series& series) {
  const float whole = rintf(z * series.turns);
  float turns = fmaf(z, series.turns, -whole) + z * series.rest;
  turns -= rintf(turns);
  const float quarter = rintf(4.0f * turns);  // -2 to 2, or NaN
  const float angle = (turns - 0.25f * quarter) * (2 * kPi);
  const float u = angle * angle;
  float s = 2.7557319223985893e-06f * u - 1.984126984126984e-04f;
  s = angle + angle * u * (-0.16666666666666666f + u * (8.333333333333333e-03f + u * s));
  float c = 2.48015873015873e-05f - 2.755731922398589e-07f * u;
  c = 1.0f + u * (-0.5f + u * (4.1666666666666664e-02f + u * (-1.388888888888889e-03f + u * c)));
  if (quarter == 1.0f) return {c, -s};
  if (quarter == -1.0f) return {-c, s};
  if (quarter == 2.0f || quarter == -2.0f) return {-s, -c};
  return {s, c};
}

__device__ inline float squashed(float z) { return kPi / (1.0f + expf(-z)); }

__device__ inline float solved(float z, int channel, const Series& series) {
  if (series.squash) z = squashed(z);
  const Rotation first = rotation(z, series);
  Rotation now = first;
  float sum = z + series.offset[channel];
  for (int q = 0; q < series.basis; ++q) {
    float ab[2];
    series.term(q, channel, ab);
    sum += ab[0] * now.sine + ab[1] * now.cosine;
    now.turn(first);
  }
  return sum;
}

}  // namespace fastfusion::cuda
