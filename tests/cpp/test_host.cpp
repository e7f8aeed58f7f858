// SPDX-License-Identifier: Apache-2.0
#include "host/build_info.h"
#include "host/norm_config.h"
#include "testing.h"

namespace {

void test_norm_config_of_real_models() {
  const auto picked = [](int dim, int64_t num_tokens) {
    return nf::to_string(nf::pick_norm_config(dim, num_tokens));
  };
  EXPECT_EQ(picked(8192, 1), "512 threads x 2 vectors");
  EXPECT_EQ(picked(16384, 64), "512 threads x 4 vectors");
  EXPECT_EQ(picked(4096, 1), "512 threads x 1 vectors");
  EXPECT_EQ(picked(576, 1), "96 threads x 1 vectors");
  EXPECT_EQ(picked(8192, 256), "512 threads x 2 vectors");
  EXPECT_EQ(picked(8192, 2048), "256 threads x 4 vectors");
  EXPECT_EQ(picked(16384, 2048), "512 threads x 4 vectors");
}

void test_norm_config_holds_every_row() {
  for (int dim = 8; dim <= 32768; dim += 8) {
    for (int64_t num_tokens : {1, 8192}) {
      const nf::NormConfig c = nf::pick_norm_config(dim, num_tokens);
      EXPECT_EQ(c.threads % 32, 0);
      EXPECT_EQ(c.threads <= (c.vecs_per_thread < 4 ? 512 : 1024), true);  // what the kernel is built for
      EXPECT_EQ(c.threads * c.vecs_per_thread * 8 >= dim, true);
      EXPECT_EQ((c.threads - 32) * c.vecs_per_thread * 8 < dim, true);  // no idle warp
    }
  }
}

void test_norm_config_rejects() {
  testing::expect_throws([] { nf::pick_norm_config(0, 1); }, "found E=0");
  testing::expect_throws([] { nf::pick_norm_config(100, 1); }, "found E=100");
  testing::expect_throws([] { nf::pick_norm_config(32776, 1); }, "want E <= 32768");
}

void test_build_info() {
  const nf::BuildInfo info = nf::build_info();
  EXPECT_EQ(info.version.empty(), false);
  EXPECT_EQ(info.archs.empty(), !info.cuda_built);
  EXPECT_EQ(info.cuda_version.empty(), !info.cuda_built);
}

}  // namespace

int main() {
  return testing::run([] {
    test_norm_config_of_real_models();
    test_norm_config_holds_every_row();
    test_norm_config_rejects();
    test_build_info();
  });
}
