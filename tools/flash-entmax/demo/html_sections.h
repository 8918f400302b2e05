// The parts of the demonstration's page.

#ifndef FLASH_ENTMAX_TOOLS_DEMO_HTML_SECTIONS_H_
#define FLASH_ENTMAX_TOOLS_DEMO_HTML_SECTIONS_H_

#include <string>

#include "demo/demo_result.h"

namespace flash_entmax::cli {

std::string ScoreSection(const DemoResult& result);
std::string CurveSection(const DemoResult& result);
std::string MapSection(const DemoResult& result);
std::string PassageSection(const DemoResult& result);
std::string MethodSection(const DemoResult& result);
std::string RepeatSection(const DemoResult& result);

}  // namespace flash_entmax::cli

#endif  // FLASH_ENTMAX_TOOLS_DEMO_HTML_SECTIONS_H_
