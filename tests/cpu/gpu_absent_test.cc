// gpu.h in a build without the GPU engine: every call says so.

#include <gtest/gtest.h>

#include "flash_entmax/gpu.h"

namespace flash_entmax {
namespace {

TEST(GpuAbsent, EveryCallSaysSo) {
  if (gpu::DescribeDevice().ok()) GTEST_SKIP() << "this build has a GPU engine and a GPU";
  const AttentionProblem problem;
  const Status statuses[] = {
      gpu::PlanAttention(problem).status(),
      gpu::AttentionForward(problem, {}, {}, {}, {}),
      gpu::AttentionBackward(problem, {}, {}, {}, {}),
      gpu::SupportWorkspaceBytes(problem).status(),
      gpu::SupportOffsets(problem, {}, {}, {}, {}),
      gpu::SupportEntries(problem, {}, {}, {}, {}, {}),
      gpu::DescribeDevice().status(),
  };
  for (const Status& status : statuses) {
    EXPECT_FALSE(status.ok());
    EXPECT_FALSE(status.message().empty());
  }
  EXPECT_EQ(gpu::DescribeDevice().status().code(), StatusCode::kDevice);
}

}  // namespace
}  // namespace flash_entmax
