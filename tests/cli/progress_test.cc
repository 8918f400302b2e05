#include "progress.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>

#include "cli/program.h"

namespace flash_entmax::cli {
namespace {

// What a child with a terminal for stderr writes there while it works for `work`.
std::string OnATerminal(const CommonOptions& common, std::chrono::milliseconds work) {
  int master = -1;
  const pid_t child = forkpty(&master, nullptr, nullptr, nullptr);
  if (child == 0) {
    {
      Progress progress(common, "work", 4, "pieces");
      for (int i = 0; i < 3; ++i) {
        std::this_thread::sleep_for(work / 3);
        progress.Add();
      }
    }
    _exit(0);
  }
  std::string text;
  char buffer[4096];
  ssize_t count = 0;
  // The end of a terminal whose last process is gone is an error.
  while ((count = read(master, buffer, sizeof(buffer))) > 0) {
    text.append(buffer, static_cast<size_t>(count));
  }
  close(master);
  int state = 0;
  EXPECT_EQ(waitpid(child, &state, 0), child);
  EXPECT_TRUE(WIFEXITED(state) && WEXITSTATUS(state) == 0);
  return text;
}

// Containers without /dev/pts have no terminals to offer.
bool HasTerminals() {
  const int master = posix_openpt(O_RDWR | O_NOCTTY);
  if (master >= 0) close(master);
  return master >= 0;
}

TEST(Progress, ShowsHowFarLongWorkIs) {
  if (!HasTerminals()) GTEST_SKIP() << "this machine has no pseudo-terminals";
  const std::string text = OnATerminal({}, std::chrono::milliseconds(1500));
  EXPECT_NE(text.find("work"), std::string::npos) << text;
  EXPECT_NE(text.find(" 75 %"), std::string::npos) << text;
  EXPECT_NE(text.find("3/4 pieces"), std::string::npos) << text;
  EXPECT_NE(text.find("pieces/s"), std::string::npos) << text;
  EXPECT_NE(text.find(" left"), std::string::npos) << text;
  // The line is empty again at the end.
  EXPECT_TRUE(text.ends_with("\r\x1B[K")) << text;
}

TEST(Progress, IsSilentForShortWork) {
  if (!HasTerminals()) GTEST_SKIP() << "this machine has no pseudo-terminals";
  EXPECT_EQ(OnATerminal({}, std::chrono::milliseconds(30)), "");
}

TEST(Progress, IsSilentWhenAskedTo) {
  if (!HasTerminals()) GTEST_SKIP() << "this machine has no pseudo-terminals";
  CommonOptions quiet;
  quiet.quiet = true;
  EXPECT_EQ(OnATerminal(quiet, std::chrono::milliseconds(1200)), "");
  CommonOptions json;
  json.json = true;
  EXPECT_EQ(OnATerminal(json, std::chrono::milliseconds(1200)), "");
}

TEST(Progress, IsSilentInAPipe) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    {
      Progress progress({}, "work", 2, "pieces");
      std::this_thread::sleep_for(std::chrono::milliseconds(1200));
      progress.Add();
    }
    _exit(0);
  }
  close(ends[1]);
  char byte = 0;
  EXPECT_EQ(read(ends[0], &byte, 1), 0);
  close(ends[0]);
  EXPECT_EQ(waitpid(child, nullptr, 0), child);
}

}  // namespace
}  // namespace flash_entmax::cli
