// The fused CPU penalty: what the registration (penalty.cpp) hands to the loops (penalty_loops.h), which are compiled
// once per instruction set. Plain pointers only: no std container may be instantiated in an ISA's translation unit.
#pragma once

#include <cstdint>

#include "kept_bits.h"

namespace moduli {

enum class WeightType { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// The work is a grid of tasks, row chunks x column chunks; its size depends on the shape alone, so that the order of
// every addition does too: results are bitwise equal for any number of threads.
struct TaskGrid {
  int64_t row_chunks, column_chunks;
};

template <typename T>
struct PenaltyProblem {
  // Weight (blocks*rows, columns, inner), strides row_stride, inner, 1 (in elements); mask like it but contiguous,
  // or null: 1 = kept.
  // Compressed rows instead: weight holds the stored entries, crow (blocks*rows + 1) and col as in torch.sparse_csr.
  const void* weight;
  const int64_t *crow, *col;
  WeightType weight_type;
  const uint8_t* mask;
  int64_t rows, columns, blocks, inner, row_stride, weight_size;  // weight_size: bytes an element

  // Points, one array a coordinate: row_points[c * row_point_stride + i], column_points[c * column_stride + j], padded with 0 so
  // that whole packs can be read. Flat coordinates reduced into their period, sphere points normalized, non-finite
  // points all NaN.
  const T* row_points;
  const T* column_points;
  int64_t coordinates, row_point_stride, column_stride;
  const int64_t* factors;  // kind and coordinates of each factor
  int64_t factor_count;
  const double* factor_parameters;

  int64_t inhibitor;
  const double* inhibitor_parameters;
  const T* table;
  int64_t table_samples;

  double power, scale;

  // Outputs. dweight like weight, contiguous, or null; added to what it holds where accumulate. Sums over entries without scale, for value, and, where
  // need_points, sum of f'(s) |w|^l (1/2) ds/dx:
  void* dweight;
  bool accumulate, need_points;
  bool mirrored;             // rows and columns share their points: see penalty_mirrored.h
  bool stream;               // dweight goes past the caches: float32, blocks 1, no kernel, whole aligned packs
  double* value_parts;       // one a task
  T* row_parts;              // [column chunk][coordinate][row]; mirrored: unused
  T* column_parts;           // [row chunk][coordinate][column_stride]; mirrored: the rows' part too
  TaskGrid grid;
  int64_t tile;  // columns of the widest tile
};

constexpr int64_t MAX_LANES = 16;

// Columns a tile, whole packs: few and of equal width, for each has a start-up cost a row, yet narrow enough for its
// buffers to stay in the first-level cache.
constexpr int64_t tile_width(int64_t columns) {
  constexpr int64_t WIDEST_ALONE = 768, WIDE = 512;
  const int64_t tiles = columns <= WIDEST_ALONE ? 1 : (columns + WIDE - 1) / WIDE;
  const int64_t packs = (columns + tiles * MAX_LANES - 1) / (tiles * MAX_LANES);
  return packs > 0 ? packs * MAX_LANES : MAX_LANES;
}

// Mirrored tasks: side of the squares that are transposed at a time, also the rows worked on as one; how many rows ahead
// of its turn a square is asked for; columns a tile, fewer where the matrix does not fit in the caches, for what is
// asked for at distances of a row would push itself out.
constexpr int64_t SQUARE = 16, ASK_AHEAD = 2;
constexpr int64_t mirrored_tile_width(int64_t size, bool stream) {
  const int64_t most = stream ? 256 : 512, whole = (size + SQUARE - 1) / SQUARE * SQUARE;
  return whole < most ? whole : most;
}

// Between buffers of a tile: a pack more than its width, so that they do not all fall on the same lines of the cache.
constexpr int64_t buffer_stride(int64_t width) { return width + MAX_LANES; }

constexpr int64_t chunk_begin(int64_t chunk, int64_t chunks, int64_t size, int64_t multiple) {
  const int64_t units = (size + multiple - 1) / multiple;
  const int64_t begin = units * chunk / chunks * multiple;
  return begin < size ? begin : size;
}

// One task; `scratch` holds scratch_size() elements and is the thread's own.
template <typename T>
using RunTask = void (*)(const PenaltyProblem<T>& problem, int64_t task, T* scratch);

constexpr int64_t tile_size(int64_t coordinates, int64_t width) { return (2 * coordinates + 8) * buffer_stride(width); }
// Elements of scratch: a tile; and two groups of mirrored weights, or the points and columns (8 bytes) of kept entries.
template <typename T>
int64_t scratch_size(const PenaltyProblem<T>& p) {
  const int64_t stride = buffer_stride(p.tile);
  return tile_size(p.coordinates, p.tile) + (p.mirrored           ? 2 * SQUARE * stride
                                                 : p.mask || p.crow ? (p.coordinates + 2) * stride
                                                                    : 0);
}

// grads *= factor
using Scale = void (*)(void* data, WeightType type, int64_t count, double factor);

#define MODULI_DECLARE_ISA(isa)                                                        \
  namespace isa {                                                                      \
  void run_task_f32(const PenaltyProblem<float>& problem, int64_t task, float* scratch);    \
  void run_task_f64(const PenaltyProblem<double>& problem, int64_t task, double* scratch);  \
  void proximal_task_f32(const PenaltyProblem<float>& problem, int64_t task, float* scratch);    \
  void proximal_task_f64(const PenaltyProblem<double>& problem, int64_t task, double* scratch);  \
  void scale(void* data, WeightType type, int64_t count, double factor);               \
  }
MODULI_DECLARE_ISA(portable)
#if MODULI_KERNELS_X86
MODULI_DECLARE_ISA(avx2)
MODULI_DECLARE_ISA(avx512)
#endif

}  // namespace moduli
