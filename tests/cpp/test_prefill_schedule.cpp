// SPDX-License-Identifier: Apache-2.0
// The order of prefill attention's tiles: every query of every head once, in the tile that its position says.
#include <random>
#include <set>
#include <utility>

#include "host/prefill_schedule.h"
#include "testing.h"

namespace {

using namespace nf::prefill;

void check_rows() {
  for (int group = 1; group <= 16; ++group) {
    const int rows = 1 << row_shift(group);
    EXPECT_EQ(rows >= group && rows < 2 * group, true);
  }
}

void check_tiles() {
  EXPECT_EQ(tiles_of(0, 2048, 3).count, 128);
  EXPECT_EQ(tiles_of(2047, 2048, 3).first, 127);
  EXPECT_EQ(tiles_of(2047, 2048, 3).count, 1);
  EXPECT_EQ(tiles_of(15, 17, 3).count, 2);
  EXPECT_EQ(tiles_of(0, 1 << 17, 0).count, 1024);
  // A chunk's tiles are tiles of the whole prompt, and end where the next chunk's begin, or in the same one.
  for (int shift = 0; shift <= 4; ++shift) {
    for (int cut = 1; cut < 300; ++cut) {
      const TileRange all = tiles_of(0, 300, shift), left = tiles_of(0, cut, shift),
                      right = tiles_of(cut, 300, shift);
      EXPECT_EQ(right.first + right.count, all.count);
      const int end = left.first + left.count;
      EXPECT_EQ(right.first == end || right.first == end - 1, true);
    }
  }
}

void check_sections() {
  EXPECT_EQ(section_heads(2048, 512, 8), 8);  // 1 MB a head
  EXPECT_EQ(section_heads(32768, 512, 8), 2);
  EXPECT_EQ(section_heads(131072, 512, 8), 1);
}

void check_places() {
  std::mt19937 random(0);
  const auto draw = [&](int low, int high) { return int(random() % unsigned(high - low + 1)) + low; };
  for (int round = 0; round < 300; ++round) {
    const int num_tiles = draw(1, 40), num_kv_heads = draw(1, 9), heads = draw(1, num_kv_heads);
    std::set<std::pair<int, int>> seen;
    Place last{num_tiles, 0};
    for (int item = 0; item < num_tiles * num_kv_heads; ++item) {
      const Place place = place_of(item, num_tiles, num_kv_heads, heads);
      EXPECT_EQ(
          place.tile >= 0 && place.tile < num_tiles && place.kv_head >= 0 && place.kv_head < num_kv_heads,
          true);
      EXPECT_EQ(seen.insert({place.tile, place.kv_head}).second, true);
      const bool new_section = place.kv_head / heads != last.kv_head / heads;
      EXPECT_EQ(place.tile <= last.tile || new_section, true);  // long before short
      last = place;
    }
  }
}

}  // namespace

int main() {
  return testing::run([] {
    check_rows();
    check_tiles();
    check_sections();
    check_places();
  });
}
