#include "io/atomic_file.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <string>
#include <utility>

#include "io/temporary_folder.h"

namespace flash_entmax::io {
namespace {

using Temporary = AtomicFile::Temporary;

class AtomicFileTest : public ::testing::TestWithParam<Temporary> {
 protected:
  TemporaryFolder folder_;
};

TEST_P(AtomicFileTest, WritesANewFile) {
  Expected<AtomicFile> file = AtomicFile::Create(folder_.File("a"), GetParam());
  ASSERT_TRUE(file.ok()) << file.status().message();
  ASSERT_TRUE(file->Write("hello ").ok());
  ASSERT_TRUE(file->Write("world").ok());
  EXPECT_FALSE(std::filesystem::exists(folder_.File("a")));
  const Status status = file->Commit();
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(ReadAll(folder_.File("a")), "hello world");
  EXPECT_EQ(folder_.Count(), 1);
}

TEST_P(AtomicFileTest, ReplacesAFileAndKeepsItsPermissions) {
  WriteAll(folder_.File("a"), "old");
  chmod(folder_.File("a").c_str(), 0640);
  Expected<AtomicFile> file = AtomicFile::Create(folder_.File("a"), GetParam());
  ASSERT_TRUE(file.ok()) << file.status().message();
  ASSERT_TRUE(file->Write("new").ok());
  EXPECT_EQ(ReadAll(folder_.File("a")), "old");
  ASSERT_TRUE(file->Commit().ok());
  EXPECT_EQ(ReadAll(folder_.File("a")), "new");
  struct stat information = {};
  ASSERT_EQ(stat(folder_.File("a").c_str(), &information), 0);
  EXPECT_EQ(information.st_mode & 0777, 0640u);
  EXPECT_EQ(folder_.Count(), 1);
}

TEST_P(AtomicFileTest, LeavesNothingWithoutACommit) {
  WriteAll(folder_.File("a"), "old");
  {
    Expected<AtomicFile> file = AtomicFile::Create(folder_.File("a"), GetParam());
    ASSERT_TRUE(file.ok());
    ASSERT_TRUE(file->Write("half of it").ok());
    AtomicFile moved = std::move(file).value();
    AtomicFile again = std::move(moved);
    ASSERT_TRUE(again.Write(", more").ok());
  }
  EXPECT_EQ(ReadAll(folder_.File("a")), "old");
  EXPECT_EQ(folder_.Count(), 1);
}

TEST_P(AtomicFileTest, FailsCleanlyWhenThereIsNoRoom) {
  // A limit on file sizes acts like a full disk, once its signal is ignored.
  struct rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  auto* handler = std::signal(SIGXFSZ, SIG_IGN);
  const struct rlimit small = {1024, before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  Status status;
  {
    Expected<AtomicFile> file = AtomicFile::Create(folder_.File("a"), GetParam());
    if (file.ok()) status = file->Write(std::string(5000, 'x'));
  }
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(status.code(), StatusCode::kIo);
  EXPECT_NE(status.message().find("File too large"), std::string::npos) << status.message();
  EXPECT_EQ(folder_.Count(), 0);
}

TEST_P(AtomicFileTest, FollowsSymbolicLinks) {
  WriteAll(folder_.File("target"), "old");
  std::filesystem::create_symlink("target", folder_.File("link"));
  Expected<AtomicFile> file = AtomicFile::Create(folder_.File("link"), GetParam());
  ASSERT_TRUE(file.ok());
  ASSERT_TRUE(file->Write("new").ok());
  ASSERT_TRUE(file->Commit().ok());
  EXPECT_TRUE(std::filesystem::is_symlink(folder_.File("link")));
  EXPECT_EQ(ReadAll(folder_.File("target")), "new");
}

INSTANTIATE_TEST_SUITE_P(Kinds, AtomicFileTest,
                         ::testing::Values(Temporary::kUnnamedIfPossible, Temporary::kNamed));

TEST(AtomicFileErrors, NameThePathAndTheReason) {
  const TemporaryFolder folder;
  Expected<AtomicFile> file = AtomicFile::Create(folder.File("missing/a"));
  ASSERT_FALSE(file.ok());
  EXPECT_EQ(file.status().code(), StatusCode::kIo);
  EXPECT_NE(file.status().message().find("missing/a"), std::string::npos);
  EXPECT_NE(file.status().message().find("No such file"), std::string::npos);

  EXPECT_EQ(AtomicFile::Create("").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(AtomicFile::Create(folder.File("")).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(AtomicFile::Create("/dev/null").status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(folder.Count(), 0);
}

TEST(AtomicFileErrors, WriteFileAtomicallyReplaces) {
  const TemporaryFolder folder;
  ASSERT_TRUE(WriteFileAtomically(folder.File("a"), "one").ok());
  ASSERT_TRUE(WriteFileAtomically(folder.File("a"), "two").ok());
  EXPECT_EQ(ReadAll(folder.File("a")), "two");
}

}  // namespace
}  // namespace flash_entmax::io
