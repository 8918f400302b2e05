// Runs the built program as a user would, and keeps what it printed.

#ifndef FLASH_ENTMAX_TESTS_CLI_PROGRAM_H_
#define FLASH_ENTMAX_TESTS_CLI_PROGRAM_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace flash_entmax {

struct ProgramResult {
  int exit_code = -1;  // −1 if a signal ended the program.
  std::string output;
  std::string error;
};

// `environment` holds entries like "NAME=value" in addition to this process's own.
ProgramResult RunProgram(const std::vector<std::string>& arguments, const std::string& input = "",
                         const std::vector<std::string>& environment = {});

// Runs with --json, expects success, silence on stderr and one JSON document, and returns it.
nlohmann::json RunForJson(std::vector<std::string> arguments, const std::string& input = "");

// Expects exit code 2, nothing on stdout, and one line "flash-entmax: …" with `message` in it.
void ExpectBadInput(const std::vector<std::string>& arguments, const std::string& message,
                    const std::string& input = "");

}  // namespace flash_entmax

#endif  // FLASH_ENTMAX_TESTS_CLI_PROGRAM_H_
