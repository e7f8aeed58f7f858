// SPDX-License-Identifier: Apache-2.0
// The packed format and the stream-K schedule without a GPU: an emulation multiplies through exactly the maps
// that the kernel uses.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "host/gemm_schedule.h"
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

// What the kernel does, CTA by CTA and thread by thread, in double.
std::vector<double> emulate(const std::vector<double>& packed, const std::vector<double>& x, int rows,
                            int cols, int tokens, const LinearSchedule& schedule) {
  const PackedShape shape = nf::packed_shape(rows, cols, 1);
  std::vector<double> out(size_t(tokens) * rows, NAN);
  std::vector<std::vector<double>> slots(schedule.num_slices);
  const auto run_piece = [&](int begin, int end) {
    std::vector<double> sum(size_t(nf::kBlockRows) * tokens);
    for (int unit = begin; unit < end; ++unit) {
      const double* tile = &packed[int64_t(unit) * nf::kBlockTileBytes];
      const int k_tile = unit % schedule.k_tiles;
      for (int row = 0; row < nf::kBlockRows; ++row)
        for (int position = 0; position < 8; ++position)
          for (int byte = 0; byte < 16; ++byte) {
            const int k = k_tile * 128 + (position ^ row % 8) * 16 + byte;
            for (int t = 0; t < tokens && k < cols; ++t)  // beyond K the copy engine writes zeros
              sum[row * tokens + t] += tile[row * 128 + position * 16 + byte] * x[size_t(t) * cols + k];
          }
    }
    return sum;
  };
  for (int pass = 0; pass < 2; ++pass)  // the first fills the slots, the second owns
    for (int cta = 0; cta < schedule.num_slices; ++cta) {
      const auto [begin, end] = schedule.slice(cta);
      for (int unit = begin; unit < end;) {
        const int block = unit / schedule.k_tiles, block_end = (block + 1) * schedule.k_tiles;
        const int piece_end = std::min(block_end, end);
        const bool owner = unit == block * schedule.k_tiles;
        if (owner != (pass == 1)) {
          unit = piece_end;
          continue;
        }
        auto sum = run_piece(unit, piece_end);
        if (!owner) {
          EXPECT_EQ(unit, begin);  // always the first piece: one slot is enough
          EXPECT_EQ(slots[cta].empty(), true);
          slots[cta] = sum;
        } else {
          if (piece_end < block_end)
            for (int other = cta + 1; other < schedule.num_slices && schedule.slice_begin(other) < block_end;
                 ++other) {
              EXPECT_EQ(slots[other].empty(), false);
              for (size_t i = 0; i < sum.size(); ++i) sum[i] += slots[other][i];
              slots[other].clear();  // read once
            }
          for (int row = 0; row < nf::kBlockRows && block * nf::kBlockRows + row < rows; ++row)
            for (int t = 0; t < tokens; ++t) {
              double& to = out[size_t(t) * rows + block * nf::kBlockRows + row];
              EXPECT_EQ(std::isnan(to), true);  // stored once
              to = sum[row * tokens + t];
            }
        }
        unit = piece_end;
      }
    }
  for (const auto& slot : slots) EXPECT_EQ(slot.empty(), true);
  EXPECT_EQ(shape.num_blocks() * shape.k_tiles(), schedule.num_units);
  return out;
}

void test_emulated_products() {
  std::mt19937 random(1);
  const auto pick = [&](int most) { return 16 * (1 + int(random() % (most / 16))); };
  for (int i = 0; i < 40; ++i) {
    const int rows = pick(700), cols = pick(1800), tokens = 1 + int(random() % 3),
              sms = 1 + int(random() % 40);
    const PackedShape shape = nf::packed_shape(rows, cols, 1);
    std::vector<double> weight(size_t(rows) * cols), x(size_t(tokens) * cols), packed(shape.packed_bytes());
    for (double& v : weight) v = int(random() % 17) - 8;
    for (double& v : x) v = int(random() % 17) - 8;
    for (int n = 0; n < rows; ++n)
      for (int k = 0; k < cols; ++k) packed[shape.offset(n, k)] = weight[size_t(n) * cols + k];
    const auto out = emulate(packed, x, rows, cols, tokens, nf::make_linear_schedule(rows, cols, 1, sms));
    for (int t = 0; t < tokens; ++t)
      for (int n = 0; n < rows; ++n) {
        double want = 0;
        for (int k = 0; k < cols; ++k) want += weight[size_t(n) * cols + k] * x[size_t(t) * cols + k];
        EXPECT_EQ(out[size_t(t) * rows + n], want);
      }
  }
}

void test_slices_are_equal_and_complete() {
  for (int sms : {2, 108, 132})
    for (auto [rows, cols, element_bytes] : {std::array{10240, 8192, 1},
                                             {8192, 28672, 1},
                                             {57344, 8192, 1},
                                             {128256, 8192, 2},
                                             {8192, 2816, 1},
                                             {16, 16, 2}}) {
      const LinearSchedule s = nf::make_linear_schedule(rows, cols, element_bytes, sms);
      EXPECT_EQ(s.slice_begin(0), 0);
      EXPECT_EQ(s.slice_begin(s.num_slices), s.num_units);
      for (int i = 0; i < s.num_slices; ++i) {
        const int units = s.slice(i).end - s.slice(i).begin;
        EXPECT_EQ(units == s.num_units / s.num_slices || units == s.num_units / s.num_slices + 1, true);
        EXPECT_EQ(s.size(i), units);
        for (int unit : {s.slice(i).begin, s.slice(i).end - 1}) EXPECT_EQ(s.next_slice(unit), i + 1);
      }
    }
  EXPECT_EQ(nf::make_linear_schedule(8192, 8192, 1, 132).num_slices, 132);
  EXPECT_EQ(nf::make_linear_schedule(16, 16, 1, 132).num_slices, 1);  // one unit
}

// The GEMM adds the slices of a block one after another (gemm_multiplier.cuh): they are the pieces that the
// split linear's CTAs have of it, in the order of K.
void test_slices_of_a_block() {
  for (int sms : {1, 2, 108, 132})
    for (auto [rows, cols] :
         {std::array{10240, 8192}, {8192, 28672}, {57344, 8192}, {8192, 2816}, {16, 16}, {640, 12288}}) {
      const LinearSchedule s = nf::make_linear_schedule(rows, cols, 1, sms);
      for (int first = 0; first < s.num_units; first += s.k_tiles) {
        std::vector<std::pair<int, int>> pieces, steps;
        for (int i = 0; i < s.num_slices; ++i) {
          const int begin = std::max(s.slice(i).begin, first),
                    end = std::min(s.slice(i).end, first + s.k_tiles);
          if (begin < end) pieces.push_back({begin - first, end - first});
        }
        int next = s.next_slice(first);
        for (int k = 0, end = s.slice_begin(next) - first; k < s.k_tiles; end += s.size(next++)) {
          steps.push_back({k, std::min(end, s.k_tiles)});
          k = steps.back().second;
        }
        EXPECT_EQ(steps == pieces, true);
      }
    }
}

void test_workspace_and_tokens() {
  EXPECT_EQ(nf::padded_tokens(1), 8);
  EXPECT_EQ(nf::padded_tokens(9), 16);
  EXPECT_EQ(nf::padded_tokens(16), 16);
  EXPECT_EQ(nf::linear_workspace_bytes(132), 132LL * 128 * 16 * 4);
}

// Each half of a block is multiplied by each half column of tokens once, and the CTAs end at about the same
// time.
void check_gemm_tiles(int ctas, int tokens, int blocks, int tile_tokens) {
  const nf::GemmSchedule s = nf::make_gemm_schedule(blocks, tokens, ctas, tile_tokens);
  const int half = tile_tokens / 2, halves = (tokens + half - 1) / half;
  EXPECT_EQ(s.num_ctas, ctas);
  std::vector<int> hits(2 * blocks * (halves + 1)), cost(s.num_ctas);
  bool has_full = false;
  for (int i = 0; i < s.num_tiles; ++i) {
    const nf::GemmTile tile = s.tile(i);
    EXPECT_EQ(!tile.shares_rows() || (s.cuts_rows && tile.part[0].num_halves == 1), true);
    if (s.is_narrow()) EXPECT_EQ(tile.shares_rows(), true);
    for (int w : {0, 1}) {
      const auto& part = tile.part[w];
      EXPECT_EQ(part.half_block >= 0 && (part.half_block % 2 == w || tile.shares_rows()), true);
      EXPECT_EQ(part.half_block / 2 < blocks || s.in_three_quarters, true);
      EXPECT_EQ(part.first_half >= 0 && part.first_half + part.num_halves <= tile.num_halves, true);
      if (!s.in_three_quarters)
        EXPECT_EQ(part.half_block, tile.part[0].half_block + (tile.shares_rows() ? 0 : w));
      cost[i % s.num_ctas] += part.num_halves;
      if (part.half_block / 2 >= blocks) continue;
      EXPECT_EQ(tile.token % half == 0 && tile.token >= 0 && tile.token + part.first_half * half < tokens,
                true);
      for (int h = part.first_half; h < part.first_half + part.num_halves; ++h)
        ++hits.at(part.half_block * (halves + 1) + tile.token / half + h);
    }
    has_full |= tile.num_halves == 2 && !tile.shares_rows();
    if (i % 2 && i < s.num_full && blocks % 2 == 0) EXPECT_EQ(tile.token, s.tile(i - 1).token);  // neighbours
  }
  EXPECT_EQ(std::count(hits.begin(), hits.end(), 1), std::ptrdiff_t(2) * blocks * halves);
  EXPECT_EQ(*std::max_element(hits.begin(), hits.end()), 1);
  EXPECT_EQ(*std::max_element(cost.begin(), cost.end()), s.quarters());
  EXPECT_EQ(s.is_narrow(), !has_full && s.cuts_rows);
}

void test_gemm_tiles() {
  for (int ctas : {1, 108, 132})
    for (int tokens : {1, 128, 129, 200, 256, 257, 300, 384, 385, 2048, 2100, 8192, 8200})
      for (int blocks : {1, 5, 44, 64, 67, 88, 280, 448})
        for (int tile_tokens : {96, 160, 224, 256}) check_gemm_tiles(ctas, tokens, blocks, tile_tokens);
  EXPECT_EQ(nf::make_gemm_schedule(64, 2048, 132, 256).quarters(), 16);
  EXPECT_EQ(nf::make_gemm_schedule(88, 2048, 132, 256).quarters(),
            22);  // 5 rounds of full tiles, 1 of halves
  EXPECT_EQ(nf::make_gemm_schedule(64, 256, 132, 256).quarters(), 2);
  EXPECT_EQ(nf::make_gemm_schedule(448, 256, 132, 256).quarters(), 14);
  for (auto [blocks, tiles] : {std::array{80, 107}, {88, 118}, {67, 90}}) {
    const nf::GemmSchedule s = nf::make_gemm_schedule(blocks, 256, 132, 256);
    EXPECT_EQ(s.in_three_quarters, true);
    EXPECT_EQ(s.num_tiles, tiles);
    EXPECT_EQ(s.quarters(), 3);
    EXPECT_EQ(nf::make_gemm_schedule(blocks, 192, 132, 192).in_three_quarters, false);
  }
  // Of few tokens, half a tile has half of the rows.
  for (auto [blocks, full] : {std::array{448, 396}, {133, 132}, {1002, 1002}, {132, 132}, {64, 0}}) {
    const nf::GemmSchedule s = nf::make_gemm_schedule(blocks, 192, 132, 192);
    EXPECT_EQ(s.num_full, full);
    EXPECT_EQ(s.is_narrow(), full == 0);
    for (int i = full; i < s.num_tiles; ++i) EXPECT_EQ(s.tile(i).shares_rows(), true);
  }
  EXPECT_EQ(nf::make_gemm_schedule(64, 256, 132, 256).tile(0).shares_rows(), true);
  // Behind full tiles of more tokens, and of a last column that is half as wide, it has half of the tokens.
  EXPECT_EQ(nf::make_gemm_schedule(448, 256, 132, 256).tile(396).shares_rows(), false);
  EXPECT_EQ(nf::make_gemm_schedule(64, 129, 132, 96).cuts_rows, false);
  EXPECT_EQ(nf::make_gemm_schedule(64, 40, 132, 96).cuts_rows, false);
  for (int tokens = 1; tokens <= 256; ++tokens)
    EXPECT_EQ(nf::gemm_tile_tokens(tokens), (tokens + 31) / 32 * 32);
  EXPECT_EQ(nf::gemm_tile_tokens(300), 160);
  EXPECT_EQ(nf::gemm_tile_tokens(384), 192);
  EXPECT_EQ(nf::gemm_tile_tokens(512), 256);
  EXPECT_EQ(nf::gemm_tile_tokens(2048), 256);
}

void test_rejects() {
  testing::expect_throws([] { nf::packed_shape(24, 16, 1); }, "found N=24");
  testing::expect_throws([] { nf::packed_shape(16, 0, 1); }, "found K=0");
  testing::expect_throws([] { nf::packed_shape(16, 16, 4); }, "found 4");
  testing::expect_throws([] { nf::padded_tokens(17); }, "found T=17");
  testing::expect_throws([] { nf::make_linear_schedule(16, 16, 1, 0); }, "found 0");
  testing::expect_throws([] { nf::make_gemm_schedule(16, 1, 0, 256); }, "found 0");
  testing::expect_throws([] { nf::make_gemm_schedule(16, 0, 1, 256); }, "found 0");
  testing::expect_throws([] { nf::make_gemm_schedule(16, 1, 1, 7); }, "found 7");
}

}  // namespace

int main() {
  return testing::run([] {
    test_offsets_of_a_tile();
    test_offsets_are_distinct();
    test_gate_up_rows();
    test_fragment_covers_the_tile();
    test_emulated_products();
    test_slices_are_equal_and_complete();
    test_slices_of_a_block();
    test_workspace_and_tokens();
    test_gemm_tiles();
    test_rejects();
  });
}
