// What the registration of the penalty (registration.cpp) hands to its loops (loops.h). The loops are compiled once per
// instruction set, therefore these structs hold plain pointers: a std container that is instantiated in such a file
// could be the copy that the linker keeps for all of them.
#pragma once

#include <cstdint>

#include "cpu/common/kept_bits.h"
#include "cpu/common/transpose.h"
#include "inhibitors.h"

namespace moduli {

enum class WeightType { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };

// The most lanes that a pack has on any instruction set. Buffers have room for whole packs of this size.
constexpr int64_t MAX_LANES = 16;

// The work is a grid of tasks, row chunks x column chunks. Its size depends on the shape alone, and so does the order
// of every addition: results are bitwise equal for any number of threads.
struct TaskGrid {
  int64_t row_chunks, column_chunks;
};

// A factor of the manifold: columns first .. first + columns of each point.
struct Factor {
  int64_t code, first, columns;
  const double* parameters;
};

template <typename T>
struct PenaltyProblem {
  // Weight (blocks * rows, columns, inner), with strides row_stride, inner and 1 in elements. If crow isn't null,
  // weight holds stored entries instead, crow (blocks * rows + 1) and col are those of torch.sparse_csr, and inner is
  // 1.
  const void* weight;
  WeightType weight_type;
  int64_t weight_size;  // bytes of an element
  const int64_t *crow, *col;
  const uint8_t* mask;  // of the weight's shape, contiguous, not 0 where an entry is kept; or null
  int64_t rows, columns, blocks, inner, row_stride;

  // Points, prepared (manifolds.h), one array a coordinate: coordinate c of row point i is
  // row_points[c * row_point_stride + i], and of column point j column_points[c * column_stride + j]. Arrays are padded
  // with 0 so that whole packs can be read. Points that aren't finite are NaN in all coordinates.
  const T *row_points, *column_points;
  int64_t coordinates, row_point_stride, column_stride;

  // Manifold
  const Factor* factors;
  int64_t factor_count;
  const bool* opposite;  // for each coordinate, true if g of the column point is minus g of the row point
  bool plane;  // two coordinates, both opposite, without curvature, and one gate block: their sums need no loop

  // Inhibitor
  int64_t inhibitor;  // its code
  InhibitorArguments<T> inhibitor_arguments;
  bool constant_inhibitor;  // f doesn't depend on the distance

  double power, scale;

  // Outputs. The sums over entries, of f |w|^l for the value and of f'(s) |w|^l g for the points, don't contain scale.
  void* dweight;  // like weight, contiguous, or null if no gradient is wanted
  bool accumulate;  // dweight is added to what it holds
  bool stream;  // dweight is written past the caches; float32, one block, inner 1, whole aligned packs
  bool need_points;  // the sums for the points are wanted
  double* value_parts;  // (tasks)
  T* row_parts;  // (column chunks, coordinates, rows); unused in a mirrored problem
  T* column_parts;  // (row chunks, coordinates, column_stride); in a mirrored problem the sums of both sides

  // How the work is cut
  bool mirrored;  // rows and columns share their points, and a coefficient is computed once a pair: mirrored_task.h
  TaskGrid grid;
  int64_t tile;  // columns of the widest tile
};

// The number of columns of a tile, whole packs. Tiles are few and of equal width, since each costs a start-up a row,
// yet narrow enough for their buffers to stay in the first-level cache.
constexpr int64_t tile_width(int64_t columns) {
  constexpr int64_t WIDEST_ALONE = 768, WIDE = 512;
  const int64_t tiles = columns <= WIDEST_ALONE ? 1 : (columns + WIDE - 1) / WIDE;
  const int64_t packs = (columns + tiles * MAX_LANES - 1) / (tiles * MAX_LANES);
  return packs > 0 ? packs * MAX_LANES : MAX_LANES;
}

// The same for a mirrored problem. Tiles are narrower if the matrix doesn't fit in the caches, since lines that are
// asked for a row apart would then push each other out.
constexpr int64_t mirrored_tile_width(int64_t size, bool stream) {
  const int64_t most = stream ? 256 : 512, whole = (size + SQUARE - 1) / SQUARE * SQUARE;
  return whole < most ? whole : most;
}

// The distance between two buffers of a tile: a pack more than its width, so that the buffers don't all fall on the
// same lines of the cache.
constexpr int64_t buffer_stride(int64_t width) { return width + MAX_LANES; }

// The number of elements of all buffers of a tile (tile.h): eight, and g and g_column of each coordinate.
constexpr int64_t tile_size(int64_t coordinates, int64_t width) { return (2 * coordinates + 8) * buffer_stride(width); }

// The number of elements of scratch that a task needs: a tile, then two groups of mirrored weights, or the points and
// the columns (8 bytes each) of kept entries.
template <typename T>
int64_t scratch_size(const PenaltyProblem<T>& p) {
  const int64_t stride = buffer_stride(p.tile);
  const int64_t behind = p.mirrored ? 2 * SQUARE * stride : p.mask || p.crow ? (p.coordinates + 2) * stride : 0;
  return tile_size(p.coordinates, p.tile) + behind;
}

// The loops of one instruction set. `scratch` holds scratch_size() elements and belongs to the calling thread.
template <typename T>
struct PenaltyLoops {
  void (*penalty)(const PenaltyProblem<T>& problem, int64_t task, T* scratch);
  void (*proximal)(const PenaltyProblem<T>& problem, int64_t task, T* scratch);
  void (*scale)(void* data, WeightType type, int64_t count, double factor);  // data *= factor
};

}  // namespace moduli
