// Viterbi's algorithm on a bitshift trellis; included inside the level's namespace, which defines V:
//   V::choose(costs, shared, count, best, choices)   the cheapest of `count` states with the same lower bits, for each
//   V::extend<W>(best, values, targets, bits, states, costs)   the cost of each state of W values, from that of its
//                                                              lower bits' best
#pragma once

constexpr float kNever = 1e30f;

template <int W>
float gap_of(const float* values, int64_t states, int64_t s, const float* targets, float cost) {
  for (int w = 0; w < W; ++w) {
    const float gap = targets[w] - values[w * states + s];
    cost = cost + gap * gap;
  }
  return cost;
}

template <class V, int W>
void path_of(const Trellis& t, const float* targets, int64_t length, int32_t overlap, int32_t* states, float* floats,
             uint8_t* choices) {
  const int64_t count = trellis_states(t), shared = trellis_shared(t);
  float *costs = floats, *best = floats + count;
  for (int64_t s = 0; s < count; ++s) {
    costs[s] = overlap >= 0 && (s >> t.bits) != overlap ? kNever : gap_of<W>(t.values, count, s, targets, 0.f);
  }
  for (int64_t i = 1; i < length; ++i) {
    V::choose(costs, shared, 1 << t.bits, best, choices + i * shared);
    V::template extend<W>(best, t.values, targets + i * W, t.bits, count, costs);
  }
  int64_t last = -1;
  for (int64_t s = 0; s < count; ++s)
    if ((overlap < 0 || (s & (shared - 1)) == overlap) && (last < 0 || costs[s] < costs[last])) last = s;
  for (int64_t i = length - 1; i >= 0; --i) {
    states[i] = static_cast<int32_t>(last);
    if (i > 0) {
      const int64_t lower = last >> t.bits;
      last = (static_cast<int64_t>(choices[i * shared + lower]) << (t.state_bits - t.bits)) | lower;
    }
  }
}

template <class V>
void path(const Trellis& t, const float* targets, int64_t length, int32_t overlap, int32_t* states, float* floats,
          uint8_t* choices) {
  const auto of = t.width == 1 ? path_of<V, 1> : path_of<V, 2>;
  of(t, targets, length, overlap, states, floats, choices);
}

// For processors without the instructions, and for the ends of loops.
inline void choose_plainly(const float* costs, int64_t shared, int count, float* best, uint8_t* choices,
                           int64_t first) {
  for (int64_t u = first; u < shared; ++u) {
    float least = costs[u];
    uint8_t choice = 0;
    for (int j = 1; j < count; ++j)
      if (costs[j * shared + u] < least) {
        least = costs[j * shared + u];
        choice = static_cast<uint8_t>(j);
      }
    best[u] = least;
    choices[u] = choice;
  }
}
