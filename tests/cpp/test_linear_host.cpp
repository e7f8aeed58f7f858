// SPDX-License-Identifier: Apache-2.0
// The packed format and the stream-K schedule without a GPU: an emulation multiplies through exactly the maps
// that the kernel uses.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "host/linear_schedule.h"
#include "host/weight_layout.h"
#include "testing.h"

namespace {

using nf::LinearSchedule;
using nf::PackedShape;

void test_offsets_of_a_tile() {
  const PackedShape shape = nf::packed_shape(8192, 28672, 1);
  EXPECT_EQ(shape.packed_bytes(), 8192LL * 28672);
  EXPECT_EQ(shape.offset(0, 0), 0);
  EXPECT_EQ(shape.offset(0, 16), 16);
  EXPECT_EQ(shape.offset(1, 0), 128 + 16);  // chunk 0 of row 1 is at position 1
  EXPECT_EQ(shape.offset(9, 5), 9 * 128 + 16 + 5);
  EXPECT_EQ(shape.offset(7, 127), 7 * 128 + 15);   // chunk 7 of row 7 is at position 0
  EXPECT_EQ(shape.offset(64, 0), 8192);            // the second warpgroup's tile
  EXPECT_EQ(shape.offset(0, 128), 16384);          // the next k tile
  EXPECT_EQ(shape.offset(128, 0), 224LL * 16384);  // the next block
  EXPECT_EQ(nf::packed_shape(128256, 16384, 2).offset(128255, 32767) > 4'000'000'000, true);  // 64 bits
}

void test_offsets_are_distinct() {
  for (auto [rows, cols, element_bytes] :
       {std::array{16, 16, 1}, {48, 80, 1}, {144, 352, 2}, {272, 704, 1}}) {
    const PackedShape shape = nf::packed_shape(rows, cols, element_bytes);
    std::vector<bool> taken(shape.packed_bytes());
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t k = 0; k < shape.row_bytes; ++k) {
        const int64_t at = shape.offset(n, k);
        EXPECT_EQ(at >= 0 && at < shape.packed_bytes() && !taken[at], true);
        taken[at] = true;
      }
  }
}

void test_gate_up_rows() {
  for (int num_rows : {32, 96, 5632}) {
    std::vector<bool> taken(num_rows);
    for (int i = 0; i < num_rows; ++i) {
      const int64_t row = nf::gate_up_row(i, num_rows);
      EXPECT_EQ(taken.at(row), false);
      taken[row] = true;
      if (i % 16 < 8)
        EXPECT_EQ(nf::gate_up_row(i + 8, num_rows), row + num_rows / 2);  // its partner is 8 rows further
    }
  }
}

void test_fragment_covers_the_tile() {
  for (int tokens : {8, 64, 128}) {
    std::vector<int> hits(64 * tokens);
    for (int thread = 0; thread < 128; ++thread)
      for (int reg = 0; reg < tokens / 2; ++reg)
        ++hits.at(nf::fragment_row(thread, reg) * tokens + nf::fragment_token(thread, reg));
    EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), std::ptrdiff_t(hits.size()));
  }
}

// What the kernels do, CTA by CTA and thread by thread, in double.
class Emulation {
 public:
  Emulation(const std::vector<double>& packed, const std::vector<double>& x, int rows, int cols, int tokens,
            int workers)
      : packed_(packed),
        x_(x),
        shape_(nf::packed_shape(rows, cols, 1)),
        cols_(cols),
        tokens_(tokens),
        workers_(workers),
        schedule_(nf::make_linear_schedule(rows, cols, 1, tokens, workers)),
        slots_(size_t(workers) * 2),
        out_(size_t(tokens) * rows, NAN) {}

  std::vector<double> run() {
    for (bool owners : {false, true})  // those who publish wait for no one
      for (int cta = 0; cta < 2 * workers_; ++cta) run_cta(cta, owners);
    for (const auto& slot : slots_) EXPECT_EQ(slot.empty(), true);
    return out_;
  }

 private:
  void run_cta(int cta, bool owners) {
    nf::Pieces pieces(schedule_, cta / 2, workers_);
    bool first = true;
    for (nf::Piece piece; pieces.next(piece); first = false) {
      EXPECT_EQ(piece.k_begin < piece.k_end && piece.k_end <= schedule_.k_tiles, true);
      const bool owner = piece.k_begin == 0;
      if (owner != owners) continue;
      const nf::Tile tile = schedule_.tile(piece.tile);
      const int block = tile.pair * 2 + cta % 2;
      if (block >= shape_.num_blocks()) continue;
      auto sum = multiply(piece, tile, block);
      if (!owner) {
        EXPECT_EQ(first, true);  // one slot is enough
        EXPECT_EQ(slots_[cta].empty(), true);
        slots_[cta] = sum;
        continue;
      }
      const int tile_end = (piece.tile + 1) * schedule_.k_tiles;
      if (piece.k_end < schedule_.k_tiles)
        for (int i = cta / 2 + 1; i < schedule_.num_slices && schedule_.slice_begin(i) < tile_end; ++i) {
          auto& slot = slots_[i * 2 + cta % 2];
          EXPECT_EQ(slot.size(), sum.size());
          for (size_t j = 0; j < sum.size(); ++j) sum[j] += slot[j];
          slot.clear();  // read once
        }
      store(sum, tile, block);
    }
  }

  int tokens_of(const nf::Tile& tile) const {
    return std::min(tokens_ - tile.column * nf::kColumnTokens, nf::kColumnTokens);
  }

  std::vector<double> multiply(const nf::Piece& piece, const nf::Tile& tile, int block) const {
    const int tokens = tokens_of(tile);
    std::vector<double> sum(size_t(nf::kBlockRows) * tokens);
    for (int k_tile = piece.k_begin; k_tile < piece.k_end; ++k_tile) {
      const double* from = &packed_[shape_.tile_offset(block, k_tile)];
      for (int row = 0; row < nf::kBlockRows; ++row)
        for (int position = 0; position < 8; ++position)
          for (int byte = 0; byte < 16; ++byte) {
            const int k = k_tile * 128 + (position ^ row % 8) * 16 + byte;
            for (int t = 0; t < tokens && k < cols_; ++t)  // beyond K the copy engine writes zeros
              sum[row * tokens + t] += from[row * 128 + position * 16 + byte] *
                                       x_[size_t(tile.column * nf::kColumnTokens + t) * cols_ + k];
          }
    }
    return sum;
  }

  void store(const std::vector<double>& sum, const nf::Tile& tile, int block) {
    const int tokens = tokens_of(tile);
    for (int row = 0; row < nf::kBlockRows && block * nf::kBlockRows + row < shape_.num_rows; ++row)
      for (int t = 0; t < tokens; ++t) {
        double& to = out_[size_t(tile.column * nf::kColumnTokens + t) * shape_.num_rows +
                          block * nf::kBlockRows + row];
        EXPECT_EQ(std::isnan(to), true);  // stored once
        to = sum[row * tokens + t];
      }
  }

  const std::vector<double>&packed_, &x_;
  const PackedShape shape_;
  const int cols_, tokens_, workers_;
  const LinearSchedule schedule_;
  std::vector<std::vector<double>> slots_;
  std::vector<double> out_;
};

void test_emulated_products() {
  std::mt19937 random(1);
  const auto pick = [&](int most) { return 16 * (1 + int(random() % (most / 16))); };
  for (int i = 0; i < 48; ++i) {
    const bool many = i % 4 == 0;
    const int rows = pick(many ? 300 : 700), cols = pick(many ? 400 : 1800),
              tokens = 1 + int(random() % (many ? 700 : 3)), workers = 1 + int(random() % (many ? 3 : 20));
    const PackedShape shape = nf::packed_shape(rows, cols, 1);
    std::vector<double> weight(size_t(rows) * cols), x(size_t(tokens) * cols), packed(shape.packed_bytes());
    for (double& v : weight) v = int(random() % 17) - 8;
    for (double& v : x) v = int(random() % 17) - 8;
    for (int n = 0; n < rows; ++n)
      for (int k = 0; k < cols; ++k) packed[shape.offset(n, k)] = weight[size_t(n) * cols + k];
    const auto out = Emulation(packed, x, rows, cols, tokens, workers).run();
    for (int t = 0; t < tokens; ++t)
      for (int n = 0; n < rows; ++n) {
        double want = 0;
        for (int k = 0; k < cols; ++k) want += weight[size_t(n) * cols + k] * x[size_t(t) * cols + k];
        EXPECT_EQ(out[size_t(t) * rows + n], want);
      }
  }
}

const std::array<int, 3> kShapes[] = {{10240, 8192, 1}, {8192, 28672, 1},  {57344, 8192, 1}, {5632, 8192, 1},
                                      {8192, 2816, 1},  {128256, 8192, 2}, {640, 16, 2},     {16, 16, 2}};

void test_every_tile_has_its_place() {
  for (int tokens : {1, 200, 256, 257, 384, 385, 2048, 2100, 8192, 8200})
    for (auto [rows, cols, element_bytes] : kShapes) {
      const LinearSchedule s = nf::make_linear_schedule(rows, cols, element_bytes, tokens, 66);
      const int columns = (tokens + 255) / 256;
      EXPECT_EQ(s.num_tiles(), (rows + 255) / 256 * columns);
      std::vector<bool> taken(s.num_tiles());
      for (int i = 0; i < s.num_tiles(); ++i) {
        const nf::Tile tile = s.tile(i);
        EXPECT_EQ(tile.pair >= 0 && tile.pair < s.num_pairs && tile.column >= 0 && tile.column < columns,
                  true);
        EXPECT_EQ(taken[tile.pair * columns + tile.column], false);
        taken[tile.pair * columns + tile.column] = true;
      }
    }
}

void test_work_is_complete_and_equal() {
  for (int workers : {1, 54, 66})
    for (int tokens : {1, 64, 256, 300, 2048, 2100, 8192})
      for (auto [rows, cols, element_bytes] : kShapes) {
        const LinearSchedule s = nf::make_linear_schedule(rows, cols, element_bytes, tokens, workers);
        int64_t least = INT64_MAX, most = 0, total = 0;
        for (int worker = 0; worker < workers; ++worker) {
          nf::Pieces pieces(s, worker, workers);
          int64_t cost = 0;
          for (nf::Piece piece; pieces.next(piece);) {
            total += piece.k_end - piece.k_begin;
            const bool half = s.has_half_column && s.tile(piece.tile).column == s.num_full_columns;
            cost += (piece.k_end - piece.k_begin) * (s.has_half_column && !half ? 2 : 1);
          }
          if (worker < s.num_slices) least = std::min(least, cost);
          most = std::max(most, cost);
        }
        EXPECT_EQ(total, int64_t(s.num_tiles()) * s.k_tiles);
        EXPECT_EQ(most - least <= 2, true);
        EXPECT_EQ(s.slice_begin(0), s.num_whole * s.k_tiles);
        EXPECT_EQ(s.slice_begin(s.num_slices), s.num_tiles() * s.k_tiles);
      }
  EXPECT_EQ(nf::make_linear_schedule(8192, 8192, 1, 1, 66).num_slices, 66);
  EXPECT_EQ(nf::make_linear_schedule(16, 16, 1, 1, 66).num_slices, 1);  // one unit
  EXPECT_EQ(nf::make_linear_schedule(8192, 8192, 1, 2048, 66).num_whole, 2 * 66);
  EXPECT_EQ(nf::make_linear_schedule(57344, 8192, 1, 256, 66).num_whole, 0);
}

void test_split_does_not_depend_on_the_tokens_of_a_column() {
  for (auto [rows, cols, element_bytes] : kShapes)
    EXPECT_EQ(nf::make_linear_schedule(rows, cols, element_bytes, 1, 66) ==
                  nf::make_linear_schedule(rows, cols, element_bytes, 256, 66),
              true);
}

void test_workspace_and_tokens() {
  EXPECT_EQ(nf::padded_tokens(1), 8);
  EXPECT_EQ(nf::padded_tokens(9), 16);
  EXPECT_EQ(nf::padded_tokens(64), 64);
  EXPECT_EQ(nf::padded_tokens(65), 256);
  EXPECT_EQ(nf::padded_tokens(8192), 256);
  EXPECT_EQ(nf::linear_workspace_bytes(256, 132), 132LL * 128 * 256 * 4);
}

void test_rejects() {
  testing::expect_throws([] { nf::packed_shape(24, 16, 1); }, "found N=24");
  testing::expect_throws([] { nf::packed_shape(16, 0, 1); }, "found K=0");
  testing::expect_throws([] { nf::packed_shape(16, 16, 4); }, "found 4");
  testing::expect_throws([] { nf::padded_tokens(0); }, "found 0");
  testing::expect_throws([] { nf::make_linear_schedule(16, 16, 1, 1, 0); }, "found 0");
  testing::expect_throws([] { nf::make_linear_schedule(16, 16, 1, 0, 1); }, "found 0");
}

}  // namespace

int main() {
  return testing::run([] {
    test_offsets_of_a_tile();
    test_offsets_are_distinct();
    test_gate_up_rows();
    test_fragment_covers_the_tile();
    test_emulated_products();
    test_every_tile_has_its_place();
    test_work_is_complete_and_equal();
    test_split_does_not_depend_on_the_tokens_of_a_column();
    test_workspace_and_tokens();
    test_rejects();
  });
}
