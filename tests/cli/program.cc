#include "cli/program.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "io/temporary_folder.h"

namespace flash_entmax {

ProgramResult RunProgram(const std::vector<std::string>& arguments, const std::string& input,
                         const std::vector<std::string>& environment) {
  const TemporaryFolder folder;
  WriteAll(folder.File("input"), input);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, folder.File("input").c_str(), O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, folder.File("output").c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  posix_spawn_file_actions_addopen(&actions, 2, folder.File("error").c_str(),
                                   O_WRONLY | O_CREAT | O_TRUNC, 0600);
  std::vector<std::string> words = {FLASH_ENTMAX_PROGRAM};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  std::vector<std::string> entries = environment;
  for (char** entry = environ; *entry != nullptr; ++entry) entries.emplace_back(*entry);
  std::vector<char*> envp;
  for (std::string& entry : entries) envp.push_back(entry.data());
  envp.push_back(nullptr);

  ProgramResult result;
  pid_t child = 0;
  const int error = posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), envp.data());
  posix_spawn_file_actions_destroy(&actions);
  EXPECT_EQ(error, 0) << "cannot start " << argv[0];
  if (error != 0) return result;
  int state = 0;
  EXPECT_EQ(waitpid(child, &state, 0), child);
  if (WIFEXITED(state)) result.exit_code = WEXITSTATUS(state);
  result.output = ReadAll(folder.File("output"));
  result.error = ReadAll(folder.File("error"));
  return result;
}

nlohmann::json RunForJson(std::vector<std::string> arguments, const std::string& input) {
  arguments.emplace_back("--json");
  const ProgramResult result = RunProgram(arguments, input);
  EXPECT_EQ(result.exit_code, 0) << result.error;
  EXPECT_EQ(result.error, "");
  nlohmann::json document = nlohmann::json::parse(result.output, nullptr, false);
  EXPECT_TRUE(document.is_object()) << result.output;
  return document;
}

void ExpectBadInput(const std::vector<std::string>& arguments, const std::string& message,
                    const std::string& input) {
  const ProgramResult result = RunProgram(arguments, input);
  EXPECT_EQ(result.exit_code, 2);
  EXPECT_EQ(result.output, "");
  EXPECT_EQ(result.error.rfind("flash-entmax: ", 0), 0u) << result.error;
  EXPECT_EQ(std::count(result.error.begin(), result.error.end(), '\n'), 1) << result.error;
  EXPECT_NE(result.error.find(message), std::string::npos) << result.error;
}

}  // namespace flash_entmax
